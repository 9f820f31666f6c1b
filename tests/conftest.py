"""Settings that hold for every test."""
from __future__ import annotations

from hypothesis import settings

# A first example pays for imports and caches, and machines are shared: time says nothing about correctness here.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
