"""Photos of subjects of the mini world whose masks are known."""
from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from helpers.photo_files import make_phone_folder
from ldm.data.mini.example_concepts import CONCEPTS
from ldm.data.mini.scenes import SceneSubject, compose
from ldm.data.mini.world import sprite_sets

SIDE = 160
BACKGROUNDS = ("table", "meadow", "forest", "city")


def photo_of(name: str, background: str) -> tuple[Image.Image, np.ndarray]:
    """Return a square photo of an example concept, and the mask (SIDE, SIDE) of the subject, booleans."""
    kind, appearance = CONCEPTS[name]
    subject = SceneSubject(kind, sprite_sets(kind, held_out=True)[0], appearance, (0.5, 0.55), 0.7, 0.0)
    photo, masks = compose(background, 0, [subject], SIDE)
    return photo.convert("RGB"), np.array(masks)[0] > 0.5


def make_known_phone_folder(folder: Path, name: str) -> dict[str, np.ndarray]:
    """Write a phone's folder (see `make_phone_folder`); return the subject's mask in each photo of it."""
    photos, masks = zip(*(photo_of(name, background) for background in BACKGROUNDS), strict=True)
    make_phone_folder(folder, photos)
    panorama = np.zeros((SIDE, 3 * SIDE), bool)
    panorama[:, 2 * SIDE:] = masks[0]
    return {"IMG_0001.HEIC": masks[0], "IMG_0002.HEIC": masks[1], "IMG_0003.jpg": masks[2],
            "IMG_0003 copy.jfif": masks[2], "Screenshot.PNG": masks[3], "PANO.jpeg": panorama}
