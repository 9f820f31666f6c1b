"""Tell what a file is by its first bytes, whatever its name is. Loads no library and runs nothing of a file."""
from __future__ import annotations

import enum
import json
import zipfile
from pathlib import Path

from ldm.common.errors import UserError

HEADER_LENGTH = 4096
MAX_SAFETENSORS_HEADER = 100_000_000  # bytes; the library's own limit
MAX_JSON = 2**20
SHORTEST_TEXT = 16  # bytes; less may be the rest of a file that was cut off
AGAIN = "download the file itself again"
UNPACK = "unpack it and name a file in it"
OTHER_WEIGHTS = "give weights as .safetensors or .ckpt"
BEGINNINGS = (  # of files that are no weights this project reads: what such a file is, and the remedy
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself", "run 'git lfs pull' in its repository, or "
     "download the file"),
    (b"\x1f\x8b", "a gzip archive", UNPACK),
    (b"BZh", "a bzip2 archive", UNPACK),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", UNPACK),
    (b"Rar!", "a RAR archive", UNPACK),
    (b"\xfd7zXZ", "an xz archive", UNPACK),
    (b"GGUF", "a GGUF file of quantized weights", OTHER_WEIGHTS),
    (b"\x89HDF", "a file of Keras or TensorFlow weights (HDF5)", OTHER_WEIGHTS),
    (b"\x89PNG", "an image", "choose another file"),
    (b"\xff\xd8\xff", "an image", "choose another file"),
    (b"RIFF", "an image or video", "choose another file"),
    (b"%PDF", "a PDF document", "choose another file"),
)
WEB_PAGE = (b"<!doctype html", b"<html", b"<head", b"<!-- ")
TEXT_CONTROLS = "\t\n\r\f\x1b"


class Format(enum.Enum):
    """The formats that tensors are stored in."""

    SAFETENSORS = "a safetensors file"
    ZIP = "a pickled checkpoint (zip)"  # what torch.save writes
    PICKLE = "a pickled checkpoint (legacy)"  # what torch.save wrote before 1.6
    UNKNOWN = "of an unknown format"


def format_of(path: Path) -> Format:
    """Return the format of a file that exists. Only its beginning is read: the rest may be missing."""
    header = read_beginning(path)
    length = int.from_bytes(header[:8], "little")
    if 2 <= length <= MAX_SAFETENSORS_HEADER and header[8:9] == b"{":
        return Format.SAFETENSORS
    if header.startswith(b"PK\x03\x04"):
        return Format.ZIP
    if header[:1] == b"\x80" and header[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return Format.PICKLE
    return Format.UNKNOWN


def check_format(path: Path) -> Format:
    """Return the format of a file.

    Raises:
        UserError: the file is missing or is known to hold no tensors. The message says what it is and what to do.
    """
    if path.is_dir():
        raise UserError(f"{path}: is a folder; name a file in it")
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    found = format_of(path)
    if found in (Format.UNKNOWN, Format.ZIP):
        check_not_foreign(path)
    return found


def check_not_foreign(path: Path) -> None:
    """Raise UserError if a file is known to hold no tensors, such as a web page saved in place of one."""
    foreign = foreign_kind(path)
    if foreign is not None:
        kind, remedy = foreign
        raise UserError(f"{path}: is {kind}; {remedy}")


def check_config_file(path: Path) -> None:
    """Raise UserError if a file that should be a YAML config holds tensors, an archive, an image or a web page."""
    if path.is_dir():
        raise UserError(f"{path}: is a folder, not a config; name a .yaml file")
    found = format_of(path)
    if found is not Format.UNKNOWN:
        raise UserError(f"{path}: is {found.value}, not a config; name a .yaml file here, and a model's weights with "
                        "--ckpt (main.py: --actual_resume)")
    foreign = foreign_kind(path)
    if foreign is not None and foreign[0] not in ("a text file", "JSON text"):
        raise UserError(f"{path}: is {foreign[0]}, not a config; {foreign[1]}")


def foreign_kind(path: Path) -> tuple[str, str] | None:
    """Return what a file is that holds no tensors, and the remedy; None if it may hold some."""
    header = read_beginning(path)
    for beginning, kind, remedy in BEGINNINGS:
        if header.startswith(beginning):
            return kind, remedy
    if header.startswith(b"PK\x03\x04"):
        return None if _may_be_torch_zip(path) else ("a zip archive of other files", UNPACK)
    if len(header) >= 64 and not header.strip(b"\0"):
        return "empty at its beginning: its download or copy was not completed", AGAIN
    return _text_kind(path, header)


def read_beginning(path: Path) -> bytes:
    """Return the first bytes of a file.

    Raises:
        UserError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return file.read(HEADER_LENGTH)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check its permissions") from None


def _text_kind(path: Path, header: bytes) -> tuple[str, str] | None:
    start = header.lstrip(b"\xef\xbb\xbf \t\r\n")
    if start.lower().startswith(WEB_PAGE):
        return "a web page, saved in place of the file", f"{AGAIN}, logged in if its site asks for that"
    if start.startswith(b"<?xml"):
        return "XML text, as servers answer with an error", AGAIN
    if start[:1] in (b"{", b"["):
        return _json_kind(path)
    if len(header) < SHORTEST_TEXT or not _is_text(header):
        return None
    return "a text file", f"choose another file, or {AGAIN}"


def _json_kind(path: Path) -> tuple[str, str] | None:
    try:
        content = json.loads(path.read_bytes()[:MAX_JSON])
    except (ValueError, OSError, RecursionError):
        return None
    if isinstance(content, dict) and isinstance(content.get("weight_map"), dict):
        return "an index of several weight files", "give the folder with all of them"
    reason = content.get("error", content.get("message")) if isinstance(content, dict) else None
    if isinstance(reason, str):
        shown = reason[:80] if reason.isprintable() else ascii(reason[:80])
        return f"a server's error message ({shown})", AGAIN
    return "JSON text", f"choose another file, or {AGAIN}"


def _may_be_torch_zip(path: Path) -> bool:
    """Return False only if a zip archive is complete and lacks the part that torch.save writes first."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return True  # cut off or damaged; the reader says so
    return any(name.rpartition("/")[2] in ("data.pkl", "constants.pkl") for name in names)


def decode_beginning(header: bytes, length: int) -> str | None:
    """Return the first `length` bytes of a file, or all of a shorter one, as text. None if they are not UTF-8.

    The last character may be cut off, unless the file is shorter.
    """
    try:
        return header.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.start < len(header) - 3 or len(header) < length:
            return None
        return header[: error.start].decode("utf-8")


def _is_text(header: bytes) -> bool:
    """Return whether bytes are UTF-8 without control characters."""
    text = decode_beginning(header, HEADER_LENGTH)
    return text is not None and all(letter.isprintable() or letter in TEXT_CONTROLS for letter in text)
