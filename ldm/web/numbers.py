"""Check the numbers of forms: browsers keep to the ranges of sliders, other programs need not."""
from __future__ import annotations

from numbers import Real

from ldm.common.errors import UserError


def number_in(name: str, value: object, least: float, most: float) -> float:
    """Return a number.

    Raises:
        UserError: it is not finite, or out of range.
    """
    if isinstance(value, bool) or not isinstance(value, Real) or not least <= value <= most:
        raise UserError(f"{name}: give a number from {_shown(least)} to {_shown(most)}")
    return float(value)


def whole_number_in(name: str, value: object, least: int, most: int) -> int:
    """Return a whole number; an empty field counts as the least.

    Raises:
        UserError: it is not whole, or out of range.
    """
    number = number_in(name, least if value is None else value, least, most)
    if number != int(number):
        raise UserError(f"{name}: give a whole number")
    return int(number)


def _shown(number: float) -> str:
    return str(int(number)) if number == int(number) else f"{number:g}"
