"""Fetches the picture sets of the mini world from the npm registry and cuts out the drawings that it uses.

Run once: python scripts/mini/fetch_drawings.py [--packages FOLDER]. Needs `npm`, unless FOLDER already holds the packages'
.tgz files, and `pip install resvg-py`, which turns three of the sets from SVG into pixels. What is written is kept with
the project, so only those who change the world need this.
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
from ldm.common.errors import UserError, one_line_errors  # noqa: E402
from ldm.common.files import write_atomically  # noqa: E402
from ldm.data.mini.world import KINDS, EXCLUDED, WORLD  # noqa: E402

log = logging.getLogger(__name__)

SIDE = 64  # the longer side of a drawing kept: scenes are 64 pixels wide
Reader = Callable[[str], bytes | None]


@dataclass(frozen=True)
class Package:
    """An npm package at one version, its SHA-256, and where in it a code point's picture lies."""

    name: str
    digest: str
    images: str = "package/icons.json"

    @property
    def archive(self) -> str:
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
NAMES = "flat"  # the set that tells which name stands for which code point, and so for those that know only names


def fetch(folder: Path, package: Package) -> Path:
    """The package's archive in `folder`, packed from the registry if it is not there, its hash checked."""
    path = folder / package.archive
    if not path.exists():
        subprocess.run(["npm", "pack", "--silent", package.name], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != package.digest:
        raise UserError(f"{path}: SHA-256 is {found}, expected {package.digest}; delete the file and run again")
    return path


def json_of(archive: Path, member: str) -> Any:
    with tarfile.open(archive) as opened:
        return json.load(opened.extractfile(member))


def pixel_reader(archive: Path, pattern: str) -> Reader:
    """Reads a set of picture files that are named by code points, some with the mark of a coloured variant."""
    with tarfile.open(archive) as opened:
        wanted = {pattern.format(kind.codepoint + mark): kind.codepoint for kind in KINDS for mark in ("-fe0f", "")}
        found = {wanted[member.name]: opened.extractfile(member).read() for member in opened if member.name in wanted}
    return found.get


def vector_reader(archive: Path, names: Mapping[str, str]) -> Reader:
    """Reads a set of SVG drawings that are named by what they show."""
    import resvg_py

    drawn = json_of(archive, "package/icons.json")

    def read(codepoint: str) -> bytes | None:
        name = names.get(codepoint) or names.get(codepoint + "-fe0f")
        icon = drawn["icons"].get(name)
        if icon is None:
            return None
        width, height = (icon.get(side, drawn.get(side, 16)) for side in ("width", "height"))
        corner = icon.get("left", 0), icon.get("top", 0)
        svg = (f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" width="256" '
               f'height="256" viewBox="{corner[0]} {corner[1]} {width} {height}">{icon["body"]}</svg>')
        return bytes(resvg_py.svg_to_bytes(svg_string=svg))

    return read


def cut(data: bytes) -> Image.Image:
    """The picture without its transparent margin, at most SIDE pixels long."""
    image = Image.open(io.BytesIO(data)).convert("RGBA")
    image = image.crop(image.getchannel("A").point(lambda a: 255 * (a > 16)).getbbox())
    scale = min(1.0, SIDE / max(image.size))
    return image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.LANCZOS)


def write_set(source: str, read: Reader) -> int:
    """Cuts and writes the drawings of one set; returns how many it has."""
    images = {kind.name: read(kind.codepoint) for kind in KINDS if (kind.name, source) not in EXCLUDED}
    there = {name: cut(data) for name, data in images.items() if data is not None}
    for name, image in there.items():
        target = WORLD / "drawings" / name.replace(" ", "_") / f"{source}.webp"
        write_atomically(target, lambda bind_attributes, image=image: image.save(bind_attributes, "WEBP", lossless=True))
    return len(there)


@one_line_errors
def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--packages", type=Path, help="folder of .tgz files, kept (default: fetched and thrown away)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.packages or Path(scratch)
        archives = {source: fetch(folder, package) for source, package in PACKAGES.items()}
        names = json_of(archives[NAMES], "package/chars.json")
        for source, package in PACKAGES.items():
            archive, where = archives[source], package.images
            read = vector_reader(archive, names) if where.endswith(".json") else pixel_reader(archive, where)
            log.info("%s: %d drawings from %s", source, write_set(source, read), package.name)


if __name__ == "__main__":
    main()
