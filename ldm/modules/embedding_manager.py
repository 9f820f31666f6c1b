"""Public path of `EmbeddingManager`, which lives in `ldm.concepts.embedding_manager`."""
from ldm.common.lazy_imports import forward_names

__getattr__ = forward_names(__name__, {"EmbeddingManager": "ldm.concepts.embedding_manager"})
