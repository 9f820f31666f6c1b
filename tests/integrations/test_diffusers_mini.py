"""The bundled model as a pipeline of diffusers draws the README's teddy as this project does: docs/diffusers.md."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm.inference import PerfusionPipeline
from scripts.mini.diffusers_pipeline import MINI, main

CONCEPT = Path(__file__).parent / "my-teddy.safetensors"  # of the README's first command
PROMPT = "a photo of a <my-teddy> on the beach"
STEPS = 8


@pytest.mark.slow
def test_the_teddy_has_its_marks(tmp_path: Path):
    main(["--concept", str(CONCEPT), "--prompt", PROMPT, "--n_samples", "1", "--steps", str(STEPS), "--outdir",
          str(tmp_path)])
    got = np.asarray(Image.open(tmp_path / "1.png").convert("RGB"), dtype=int)

    own = PerfusionPipeline.from_pretrained(MINI, device="cpu")
    own.load_concepts(CONCEPT)
    expected = np.asarray(own(PROMPT, seed=1, num_inference_steps=STEPS).images[0], dtype=int)
    assert abs(got - expected).max() <= 2

    # Purple belly and legs: in its photos and in its image, but not in that of an ordinary teddy.
    photo = np.asarray(Image.open(MINI / "examples" / "teddy" / "0.png").convert("RGB").resize((64, 64)), dtype=int)
    ordinary = own("a photo of a teddy bear on the beach", seed=1, num_inference_steps=STEPS).images[0]
    assert min(purple_share(photo), purple_share(got)) > 0.05 > 5 * purple_share(np.asarray(ordinary, dtype=int))


def purple_share(image: np.ndarray) -> float:
    """Return the share of pixels with less green than red and than blue."""
    red, green, blue = np.moveaxis(image, -1, 0)
    return float(((red > green + 30) & (blue > green + 40)).mean())
