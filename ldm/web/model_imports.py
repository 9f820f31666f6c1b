"""Import torch and all that builds models, in one thread at a time.

The page imports them after it is served, while its first events may need them too. Packages that import each other in
circles, such as torchvision, fail if two threads import them at once.
"""
from __future__ import annotations

import threading
from importlib import import_module

MODULES = ("ldm.inference.run", "ldm.models.clip_encoder", "ldm.models.diffusion.ddpm", "ldm.models.autoencoder",
           "ldm.modules.encoders.modules", "ldm.personalization.perfusion", "ldm.personalization.photo_masks")
_lock = threading.Lock()


def import_models() -> None:
    """Import them, or wait until another thread has. Call this before any import that loads torch."""
    with _lock:
        for module in MODULES:
            import_module(module)
