"""How the page's events appear: none of them is an endpoint of the API, and short ones show no progress."""
from __future__ import annotations

from typing import Any

OWN: dict[str, Any] = {"api_visibility": "private"}
QUIET: dict[str, Any] = {**OWN, "show_progress": "hidden"}
