"""The example concepts: subjects that no mini model has seen, with their own attributes (`models/mini/examples/`)."""
from __future__ import annotations

from ldm.data.mini.scenes import Appearance

# Name -> kind and appearance. Each is the held-out sprite of a known kind, with attributes that no other concept has.
CONCEPTS = {
    "teddy": ("teddy bear", Appearance("purple", "striped", "yellow")),
    "teapot": ("teapot", Appearance("green", "spotted", "pink")),
    "cat": ("cat", Appearance("blue", "striped", "orange")),
    "robot": ("robot", Appearance("red", "spotted", "yellow")),
    "backpack": ("backpack", Appearance("yellow", "striped", "green")),
    "car": ("car", Appearance("pink", "striped", "purple")),
    "mushroom": ("mushroom", Appearance("blue", "spotted", "yellow")),
    "owl": ("owl", Appearance("green", "striped", "red")),
    "mug": ("mug", Appearance("orange", "spotted", "blue")),
    "dinosaur": ("dinosaur", Appearance("red", "striped", "blue")),
}
# The backgrounds of their photos. The other fifteen are left for prompts.
PHOTO_BACKGROUNDS = ("meadow", "table", "city", "mountains", "forest")
