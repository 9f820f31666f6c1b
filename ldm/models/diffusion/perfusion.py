"""Public path of `Perfusion`, which lives in `ldm.personalization.perfusion`."""
from ldm.common.lazy_imports import forward_names

__getattr__ = forward_names(__name__, {"Perfusion": "ldm.personalization.perfusion"})
