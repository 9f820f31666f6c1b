"""Names of output files."""
from __future__ import annotations

import re


def slug(text: str) -> str:
    """Return text as a part of a file's name: lower-case letters, digits, points and hyphens."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")
