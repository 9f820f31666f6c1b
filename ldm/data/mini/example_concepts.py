"""The example concepts: things that no mini model has seen, in colours of their own; see `models/mini/examples/`."""
from __future__ import annotations

from ldm.data.mini.scenes import Look

# Each is the held-out drawing of a known kind in a look that is its own.
CONCEPTS = {
    "teddy": ("teddy bear", Look("purple", "striped", "yellow")),
    "teapot": ("teapot", Look("green", "spotted", "pink")),
    "cat": ("cat", Look("blue", "striped", "orange")),
    "robot": ("robot", Look("red", "spotted", "yellow")),
    "backpack": ("backpack", Look("yellow", "striped", "green")),
    "car": ("car", Look("pink", "striped", "purple")),
    "mushroom": ("mushroom", Look("blue", "spotted", "yellow")),
    "owl": ("owl", Look("green", "striped", "red")),
    "mug": ("mug", Look("orange", "spotted", "blue")),
    "dinosaur": ("dinosaur", Look("red", "striped", "blue")),
}
# Where the pictures show them. The other fifteen places are left for prompts.
PHOTO_PLACES = ("meadow", "table", "city", "mountains", "forest")
