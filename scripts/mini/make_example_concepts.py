"""Makes the example concepts: five pictures each of one thing that no mini model has seen, with marks of its own.

    python scripts/mini/make_example_concepts.py

Every concept is a held-out drawing of a known kind (see `ldm/data/mini/world.py`) in colours of its own, on five
backgrounds. The drawings are Twemoji's, CC-BY 4.0; the pictures made of them are under the same licence.
"""
from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from ldm.common.errors import one_line_errors  # noqa: E402
from ldm.common.files import write_atomically  # noqa: E402
from ldm.data.mini.example_concepts import CONCEPTS, PHOTO_PLACES  # noqa: E402
from ldm.data.mini.scenes import Look, Thing, compose  # noqa: E402
from ldm.data.mini.world import drawings_of  # noqa: E402

log = logging.getLogger(__name__)

EXAMPLES = Path(__file__).resolve().parents[2] / "models" / "mini" / "examples"


def pictures(kind: str, look: Look, size: int, seed: int) -> list[Image.Image]:
    """One picture per place, the thing a little elsewhere, larger or turned in each."""
    rng = np.random.default_rng(seed)
    source = drawings_of(kind, held_out=True)[0]
    made = []
    for place in PHOTO_PLACES:
        thing = Thing(kind, source, look, (0.5 + rng.uniform(-0.03, 0.03), 0.55 + rng.uniform(-0.02, 0.02)),
                      rng.uniform(0.62, 0.78), float(rng.uniform(-6, 6)))
        made.append(compose(place, int(rng.integers(48)), [thing], size)[0])
    return made


@one_line_errors
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--outdir", type=Path, default=EXAMPLES, help="where to (default: models/mini/examples)")
    parser.add_argument("--size", type=int, default=128, help="side of the pictures in pixels (default: 128)")
    parser.add_argument("--seed", type=int, default=7,
                        help="of the first concept's places, sizes and turns; the next ones count up (default: 7)")
    options = parser.parse_args()
    for seed, (name, (kind, look)) in enumerate(CONCEPTS.items(), start=options.seed):
        for number, picture in enumerate(pictures(kind, look, options.size, seed)):
            write_atomically(options.outdir / name / f"{number}.png",
                        lambda aside, picture=picture: picture.save(aside, "PNG"))
        log.info("%s: %d pictures in %s", name, len(PHOTO_PLACES), options.outdir / name)


if __name__ == "__main__":
    main()
