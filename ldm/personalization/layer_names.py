"""Choose cross-attention layers by their names."""
from __future__ import annotations

from collections.abc import Collection, Sequence

from ldm.common.errors import UserError


def find_layers(param: str, prefixes: Sequence[str], names: Collection[str]) -> list[str]:
    """Return the layers with these names or leading parts of a name: `output_blocks.1` does not match 10.

    Args:
        param: name of the param that chooses them, for messages.
        prefixes: names and leading parts; none choose none.
        names: the names of all layers.

    Raises:
        UserError: a prefix matches no layer.
    """
    def matches(name: str, prefix: str) -> bool:
        return f"{name}.".startswith(f"{prefix.rstrip('.')}.")

    for prefix in prefixes:
        if not any(matches(name, prefix) for name in names):
            raise UserError(f"{param}: no layer that reads text is called {prefix}; there are {', '.join(names)}")
    return [name for name in names if any(matches(name, prefix) for prefix in prefixes)]
