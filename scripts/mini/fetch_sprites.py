"""Fetch the emoji sets of the mini world from the npm registry and write the sprites that it uses.

    python scripts/mini/fetch_sprites.py [--packages FOLDER]

Needs `npm`, unless FOLDER already holds the packages' .tgz files, and `pip install resvg-py`, which renders three of
the sets from SVG. The sprites are part of the repository, so only those who change the mini world need this.
"""
from __future__ import annotations

import hashlib
import io
import json
import logging
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from ldm.cli.parser import Parser  # noqa: E402
from ldm.common.atomic_write import write_atomically  # noqa: E402
from ldm.common.errors import UserError, one_line_errors  # noqa: E402
from ldm.common.paths import user_path  # noqa: E402
from ldm.data.mini.world import EXCLUDED, KINDS, sprite_file  # noqa: E402

log = logging.getLogger(__name__)

MAX_SIDE = 64  # of a sprite: scenes are 64 pixels wide
Reader = Callable[[str], bytes | None]


@dataclass(frozen=True)
class Package:
    """An npm package with an emoji set.

    Attributes:
        name: name with version.
        digest: its SHA-256.
        images: path of a code point's image in the package, or of the JSON file with all images.
    """

    name: str
    digest: str
    images: str = "package/icons.json"

    @property
    def archive(self) -> str:
        """File name of the package."""
        return self.name.removeprefix("@").replace("/", "-").replace("@", "-") + ".tgz"


PACKAGES = {
    "fluent": Package("@lobehub/fluent-emoji-3d@1.1.0",
                      "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58", "package/assets/{}.webp"),
    "noto": Package("emoji-datasource-google@16.0.0",
                    "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438", "package/img/google/64/{}.png"),
    "twemoji": Package("emoji-datasource-twitter@16.0.0",
                       "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
                       "package/img/twitter/64/{}.png"),
    "flat": Package("@iconify-json/fluent-emoji-flat@1.2.6",
                    "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175"),
    "noto_v1": Package("@iconify-json/noto-v1@1.2.5",
                       "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37"),
    "emojione": Package("@iconify-json/emojione@1.2.3",
                        "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e"),
}
NAMES = "flat"  # the set that lists the name of each code point; other sets have only names


def fetch(folder: Path, package: Package) -> Path:
    """Return the package's archive in `folder`, and fetch it from the registry if it is missing.

    Raises:
        UserError: the archive has another SHA-256 than expected.
    """
    path = folder / package.archive
    if not path.exists():
        subprocess.run(["npm", "pack", "--silent", package.name], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != package.digest:
        raise UserError(f"{path}: SHA-256 is {digest}, expected {package.digest}; delete the file and run again")
    return path


def read_json(archive: Path, member: str) -> Any:
    """Read a JSON file of an archive."""
    with tarfile.open(archive) as opened:
        return json.load(opened.extractfile(member))


def pixel_reader(archive: Path, pattern: str) -> Reader:
    """Return a reader of image files that are named by code points, some with the selector of the color variant."""
    with tarfile.open(archive) as opened:
        codepoints = {pattern.format(kind.codepoint + selector): kind.codepoint
                      for kind in KINDS for selector in ("-fe0f", "")}
        files = {codepoints[member.name]: opened.extractfile(member).read()
                 for member in opened if member.name in codepoints}
    return files.get


def vector_reader(archive: Path, names: Mapping[str, str]) -> Reader:
    """Return a reader of SVG images that are named by what they show; `names` maps code points to these names."""
    import resvg_py

    icons = read_json(archive, "package/icons.json")

    def read(codepoint: str) -> bytes | None:
        name = names.get(codepoint) or names.get(codepoint + "-fe0f")
        icon = icons["icons"].get(name)
        if icon is None:
            return None
        width, height = (icon.get(side, icons.get(side, 16)) for side in ("width", "height"))
        corner = icon.get("left", 0), icon.get("top", 0)
        svg = (f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" width="256" '
               f'height="256" viewBox="{corner[0]} {corner[1]} {width} {height}">{icon["body"]}</svg>')
        return bytes(resvg_py.svg_to_bytes(svg_string=svg))

    return read


def trim(data: bytes) -> Image.Image:
    """Return the image without its transparent margin, at most `MAX_SIDE` pixels long."""
    image = Image.open(io.BytesIO(data)).convert("RGBA")
    image = image.crop(image.getchannel("A").point(lambda a: 255 * (a > 16)).getbbox())
    scale = min(1.0, MAX_SIDE / max(image.size))
    return image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.LANCZOS)


def write_set(emoji_set: str, read: Reader) -> int:
    """Write the sprites of one set and return their number."""
    count = 0
    for kind in KINDS:
        data = None if (kind.name, emoji_set) in EXCLUDED else read(kind.codepoint)
        if data is not None:
            sprite = trim(data)
            write_atomically(sprite_file(kind.name, emoji_set),
                             lambda temporary, sprite=sprite: sprite.save(temporary, "WEBP", lossless=True))
            count += 1
    return count


@one_line_errors
def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--packages", type=user_path, metavar="FOLDER",
                        help="folder of .tgz files, which are kept (default: a temporary folder)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.packages or Path(scratch)
        archives = {emoji_set: fetch(folder, package) for emoji_set, package in PACKAGES.items()}
        names = read_json(archives[NAMES], "package/chars.json")
        for emoji_set, package in PACKAGES.items():
            archive = archives[emoji_set]
            if package.images.endswith(".json"):
                read = vector_reader(archive, names)
            else:
                read = pixel_reader(archive, package.images)
            log.info("%s: %d sprites from %s", emoji_set, write_set(emoji_set, read), package.name)


if __name__ == "__main__":
    main()
