"""Tell image files from others by their content, and say what the others are.

A suffix alone is no proof: browsers save JPEG files as `.jfif`, phones name HEIC files `.JPG`, and Live Photos have a
video beside each photo. Most kinds of files begin with bytes that no other kind begins with.
"""
from __future__ import annotations

from pathlib import Path

from ldm.common.file_formats import decode_beginning

HEADER_LENGTH = 512

# Files with these suffixes are taken for images without a look inside, so that large folders are listed fast. Reading
# them shows whether they are.
IMAGE_SUFFIXES = frozenset((
    ".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".mpo", ".png", ".apng", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff",
    ".heic", ".heif", ".hif", ".avif", ".jxl", ".jp2", ".j2k", ".jpf", ".jpx", ".j2c", ".tga", ".icb", ".vda", ".vst",
    ".ppm", ".pgm", ".pbm", ".pnm", ".qoi", ".psd", ".pcx", ".dds", ".ico"))
RAW_SUFFIXES = frozenset((
    ".dng", ".cr2", ".cr3", ".crw", ".nef", ".nrw", ".arw", ".sr2", ".srf", ".orf", ".rw2", ".raf", ".pef", ".srw",
    ".3fr", ".fff", ".iiq", ".rwl", ".x3f", ".kdc", ".dcr", ".mrw", ".erf", ".mef", ".mos"))
SIDECAR_SUFFIXES = frozenset((".xmp", ".aae", ".json", ".thm", ".pp3", ".dop"))

RAW = "a camera's RAW file; export it as JPEG"
VIDEO = "a video"
BEGINNINGS = (  # not of images; the first that fits
    (b"\x1aE\xdf\xa3", VIDEO), (b"\0\0\x01\xba", VIDEO), (b"\0\0\x01\xb3", VIDEO), (b"FLV\x01", VIDEO),
    (b"0&\xb2u\x8ef\xcf\x11", VIDEO), (b"%PDF", "a PDF document"), (b"%!PS", "a PostScript document"),
    (b"PK\x03\x04", "a ZIP archive"), (b"Rar!", "an archive"), (b"7z\xbc\xaf\x27\x1c", "an archive"),
    (b"ID3", "a sound file"), (b"OggS", "a sound file"), (b"fLaC", "a sound file"),
    (b"FUJIFILMCCD-RAW", RAW), (b"IIRO", RAW), (b"IIRS", RAW), (b"MMOR", RAW), (b"IIU\0", RAW), (b"FOVb", RAW),
    (b"\0MRM", RAW), (b"version https://git-lfs", "a pointer of Git LFS; run `git lfs pull`"))
HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"mif2", b"msf1")
AVIF_BRANDS = (b"avif", b"avis")
QUICKTIME_BOXES = (b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot")  # that old QuickTime films begin with
JXL_BEGINNINGS = (b"\xff\x0a", b"\0\0\0\x0cJXL \r\n\x87\n")


def read_header(path: Path) -> bytes:
    """Return the first bytes of a file. Raise OSError if it cannot be read."""
    with path.open("rb") as file:
        return file.read(HEADER_LENGTH)


def is_heif(header: bytes) -> bool:
    """Return whether a file that begins so is HEIC or another HEIF, for which Pillow needs a plugin."""
    return header[4:8] == b"ftyp" and header[8:12] in HEIF_BRANDS


def is_jxl(header: bytes) -> bool:
    """Return whether a file that begins so is JPEG XL, for which Pillow needs a plugin."""
    return header.startswith(JXL_BEGINNINGS)


def foreign_kind(header: bytes) -> str | None:
    """Return what a file that begins so is if that is certainly no image we read, such as "a video"; else None."""
    if not header:
        return "an empty file"
    box, brand = header[4:8], header[8:12]
    if box == b"ftyp" and brand not in (*HEIF_BRANDS, *AVIF_BRANDS):
        return RAW if brand == b"crx " else VIDEO
    if box in QUICKTIME_BOXES or (header[:4] == b"RIFF" and brand == b"AVI "):
        return VIDEO
    if header[:4] in (b"II*\0", b"MM\0*") and header[8:10] == b"CR":  # Canon's variant of TIFF
        return RAW
    known = [kind for beginning, kind in BEGINNINGS if header.startswith(beginning)]
    return known[0] if known else _text_kind(header)


def describe_file(path: Path) -> str:
    """Say in a few words what a file that is no image is."""
    if path.is_dir():
        return "a folder"
    if path.is_symlink() and not path.exists():
        return "a broken link"
    suffix = path.suffix.lower()
    if suffix in RAW_SUFFIXES:
        return RAW
    if suffix in SIDECAR_SUFFIXES:
        return "a sidecar file"
    try:
        return foreign_kind(read_header(path)) or "no image"
    except OSError as error:
        return f"cannot be read: {error.strerror}"


def _text_kind(header: bytes) -> str | None:
    """Return the kind of a text; None if it is none, or the plain text of a PPM, PGM or PBM image."""
    start = header.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith((b"<!doctype html", b"<html", b"<head")):
        return "a web page"
    if start.startswith((b"<svg", b"<?xml", b"<!doctype svg")) and b"<svg" in start:
        return "a drawing (SVG)"
    is_plain_image = header[:1] == b"P" and header[1:2].isdigit() and header[2:3].isspace()
    text = decode_beginning(header, HEADER_LENGTH) if b"\0" not in header else None
    is_text = text is not None and all(letter.isprintable() or letter.isspace() for letter in text)
    return "a text file" if is_text and not is_plain_image else None
