"""Make the photos of the example concepts: five each of a subject that no mini model has seen.

    python scripts/mini/make_example_concepts.py

Every concept is the held-out sprite of a known kind (see `ldm/data/mini/world.py`) with its own attributes, on five
backgrounds. The sprites are those of Twemoji, CC-BY 4.0, and the photos made of them are under the same license.
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
from ldm.common.atomic_write import write_atomically  # noqa: E402
from ldm.common.errors import one_line_errors  # noqa: E402
from ldm.common.paths import PROJECT_ROOT, user_path  # noqa: E402
from ldm.data.mini.example_concepts import CONCEPTS, PHOTO_BACKGROUNDS  # noqa: E402
from ldm.data.mini.scenes import VARIANTS_PER_BACKGROUND, Appearance, SceneSubject, compose  # noqa: E402
from ldm.data.mini.world import sprite_sets  # noqa: E402

log = logging.getLogger(__name__)

EXAMPLES = PROJECT_ROOT / "models" / "mini" / "examples"


def compose_photos(kind: str, appearance: Appearance, size: int, seed: int) -> list[Image.Image]:
    """Return one image per background, with the subject at a slightly different position, extent and angle in each."""
    rng = np.random.default_rng(seed)
    emoji_set = sprite_sets(kind, held_out=True)[0]
    photos = []
    for background in PHOTO_BACKGROUNDS:
        center = (0.5 + rng.uniform(-0.03, 0.03), 0.55 + rng.uniform(-0.02, 0.02))
        subject = SceneSubject(kind, emoji_set, appearance, center, rng.uniform(0.62, 0.78), float(rng.uniform(-6, 6)))
        photo, _ = compose(background, int(rng.integers(VARIANTS_PER_BACKGROUND)), [subject], size)
        photos.append(photo)
    return photos


@one_line_errors
def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--outdir", type=user_path, default=EXAMPLES, metavar="FOLDER",
                        help="folder to write to (default: models/mini/examples)")
    parser.add_argument("--size", type=int, default=128, help="side of the images in pixels (default: 128)")
    parser.add_argument("--seed", type=int, default=7,
                        help="seed of the first concept's positions, extents and angles; each further one adds 1 "
                        "(default: 7)")
    options = parser.parse_args()
    for seed, (name, (kind, appearance)) in enumerate(CONCEPTS.items(), start=options.seed):
        for index, photo in enumerate(compose_photos(kind, appearance, options.size, seed)):
            write_atomically(options.outdir / name / f"{index}.png",
                             lambda temporary, photo=photo: photo.save(temporary, "PNG"))
        log.info("%s: %d photos in %s", name, len(PHOTO_BACKGROUNDS), options.outdir / name)


if __name__ == "__main__":
    main()
