"""The methods that are compared.

To compare a method of your own, add an entry to `BASELINES`, with a config whose `model.target` is its class. For a
single run, `reproduce.py --methods my_method.yaml` does the same without an entry.
"""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from evaluation.paper.design import Method
from ldm.common.errors import UserError
from ldm.common.paths import resolve_path

TRAINING_BIAS = 0.75  # of configs/perfusion.yaml
LOWER_TRAINING_BIAS = 0.4

# What the other methods are compared with.
BASE_MODEL = Method("base model", trained=False)
PERFUSION = Method("Perfusion", combinable=True)

# Perfusion with one change.
TRAINED_KEYS = Method("trained keys", overrides=("model.params.locking=trained",))
GATED_PROJECTION = Method("gated projection", overrides=("model.params.projection=gated",))
FULL_PROJECTION = Method("full projection", overrides=("model.params.projection=full",))
NO_MASKS = Method("no masks", masks=False)
ONE_PHOTO = Method("one photo", photos=1)
LOWER_BIAS = Method(f"training bias {LOWER_TRAINING_BIAS:g}",
                    overrides=(f"model.params.bias={LOWER_TRAINING_BIAS:g}",))

# Concepts that the bundled encoder predicts from photos, as they are or after some steps.
FEW_STEPS, ALL_STEPS = 12, 200
STRENGTHS = (0.5, 1.0, 1.25)  # beside the encoder's own
ENCODER = "models/mini/encoder"
ENCODER_BASE = "models/mini/model.safetensors"  # the model that it is for
FAST_RATE = "model.params.value_lr=0.02"  # this and all layers are what configs/perfusion-fast.yaml has
EVERY_LAYER = "model.params.used_layers=null"


def _encoded(steps: int, *overrides: str) -> tuple[str, ...]:
    return (f"model.params.encoder={ENCODER}", f"lightning.trainer.max_steps={steps}", FAST_RATE, *overrides)


PREDICTED = Method("encoder", overrides=_encoded(0, EVERY_LAYER), combinable=True)
PREDICTED_AT = tuple(Method(f"encoder at strength {strength:g}",
                            overrides=_encoded(0, EVERY_LAYER, f"model.params.encoder_strength={strength:g}"))
                     for strength in STRENGTHS)
PREDICTED_FROM_ONE = Method("encoder, one photo", overrides=_encoded(0, EVERY_LAYER), photos=1)
REFINED = Method(f"encoder and {FEW_STEPS} steps", overrides=_encoded(FEW_STEPS, EVERY_LAYER), combinable=True)
STARTED_FROM_ENCODER = Method(f"encoder and {ALL_STEPS} steps", overrides=_encoded(ALL_STEPS))
FROM_NOTHING = Method(f"{FEW_STEPS} steps from nothing",
                      overrides=("model.params.encoder=null", f"lightning.trainer.max_steps={FEW_STEPS}"))

# Perfusion with a share of what its other layers learn, without and with scenes beside other things.
SHARES_LAYERS = Method("other layers to a quarter", overrides=("model.params.other_layers_share=0.25",))
WITH_SCENES = Method("scenes, other layers to a half", overrides=(
    "model.params.copy_paste_scenes=10", "model.params.scene_steps=15", "model.params.scene_scale=2",
    "model.params.other_layers_share=0.5"), combinable=True)  # as in configs/perfusion-scenes.yaml

# Other methods.
TEXTUAL_INVERSION = Method("Textual Inversion", "configs/baselines/textual-inversion.yaml", combinable=True)
FOUR_VECTORS = Method("Textual Inversion, 4 vectors", "configs/baselines/textual-inversion.yaml",
                      ("model.params.vectors_per_word=4",))
CELEB_BASIS = Method("Celeb Basis", "configs/baselines/celeb-basis.yaml", combinable=True)
CUSTOM_DIFFUSION = Method("Custom Diffusion", "configs/baselines/custom-diffusion.yaml", combinable=True,
                          stores_weights=True)
DREAMBOOTH = Method("DreamBooth", "configs/baselines/dreambooth.yaml", stores_weights=True)
BASELINES = (TEXTUAL_INVERSION, FOUR_VECTORS, CELEB_BASIS, CUSTOM_DIFFUSION, DREAMBOOTH)


def select_methods(names: Sequence[str] | None) -> tuple[Method, ...]:
    """Return the methods to compare Perfusion with.

    Args:
        names: keys of `BASELINES`, or config files of other methods, whose names become the methods' names. None
            selects all of `BASELINES`. Perfusion may be named, too: it takes part in any case.

    Raises:
        UserError: if a name is neither.
    """
    if names is None:
        return BASELINES
    known = {method.key: method for method in BASELINES}
    selected = []
    for name in names:
        if name in known:
            selected.append(known[name])
        elif name.endswith((".yaml", ".yml")) and resolve_path(name).is_file():
            selected.append(Method(Path(name).stem, name))
        elif name != PERFUSION.key:
            raise UserError(f"--methods {name}: unknown; give some of {', '.join(known)}, or a method's config file")
    return tuple(dict.fromkeys(selected))
