"""Checks on the params of methods."""
from __future__ import annotations

from ldm.common.errors import UserError


def check_positive(**values: float) -> None:
    """Raise UserError that names the first param that is not above 0."""
    for name, value in values.items():
        if value <= 0:
            raise UserError(f"{name} {value} must be above 0")
