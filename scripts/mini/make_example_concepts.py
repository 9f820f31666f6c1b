"""Makes the example concepts: five pictures each of one thing that no mini model has seen, with marks of its own.

    python scripts/mini/make_example_concepts.py

Every concept is a held-out drawing of a known kind (see `ldm/data/mini/world.py`) in colours of its own, on five
backgrounds. The drawings are Twemoji's, CC-BY 4.0; the pictures made of them are under the same licence.
"""
from __future__ import annotations

import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from ldm.common.threads import use_passive_waiting  # noqa: E402

use_passive_waiting()  # before torch is imported

import numpy as np  # noqa: E402
from PIL import Image  # noqa: E402

from ldm.cli.parser import Parser  # noqa: E402
from ldm.common.errors import one_line_errors  # noqa: E402
from ldm.common.files import write_atomically  # noqa: E402
from ldm.data.mini.example_concepts import CONCEPTS, PHOTO_BACKGROUNDS  # noqa: E402
from ldm.data.mini.scenes import Appearance, SceneSubject, compose  # noqa: E402
from ldm.data.mini.world import sprite_sets  # noqa: E402

log = logging.getLogger(__name__)

EXAMPLES = Path(__file__).resolve().parents[2] / "models" / "mini" / "examples"


def images(kind: str, appearance: Appearance, size: int, seed: int) -> list[Image.Image]:
    """One picture per place, the thing a little elsewhere, larger or turned in each."""
    rng = np.random.default_rng(seed)
    source = sprite_sets(kind, held_out=True)[0]
    made = []
    for background in PHOTO_BACKGROUNDS:
        subject = SceneSubject(kind, source, appearance, (0.5 + rng.uniform(-0.03, 0.03), 0.55 + rng.uniform(-0.02, 0.02)),
                      rng.uniform(0.62, 0.78), float(rng.uniform(-6, 6)))
        made.append(compose(background, int(rng.integers(48)), [subject], size)[0])
    return made


@one_line_errors
def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--outdir", type=Path, default=EXAMPLES, help="where to (default: models/mini/examples)")
    parser.add_argument("--size", type=int, default=128, help="side of the pictures in pixels (default: 128)")
    parser.add_argument("--seed", type=int, default=7,
                        help="of the first concept's places, sizes and turns; the next ones count up (default: 7)")
    options = parser.parse_args()
    for seed, (name, (kind, appearance)) in enumerate(CONCEPTS.items(), start=options.seed):
        for number, image in enumerate(images(kind, appearance, options.size, seed)):
            write_atomically(options.outdir / name / f"{number}.png",
                        lambda bind_attributes, image=image: image.save(bind_attributes, "PNG"))
        log.info("%s: %d pictures in %s", name, len(PHOTO_BACKGROUNDS), options.outdir / name)


if __name__ == "__main__":
    main()
