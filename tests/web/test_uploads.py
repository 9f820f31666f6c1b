"""Uploaded files as photos: what is accepted, what is refused, and where files go."""
from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ldm.common.errors import UserError
from ldm.web.run_folder import RunFolder
from ldm.web.uploads import MOST_PHOTOS, add_photos, safe_name


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    (tmp_path / "run" / "photos").mkdir(parents=True)
    return RunFolder(tmp_path / "run")


def save_photo(path: Path, color: str = "red") -> Path:
    Image.new("RGB", (80, 64), color).save(path)
    return path


def test_photos_are_copied_and_equal_names_are_numbered(tmp_path: Path, run: RunFolder) -> None:
    first = save_photo(tmp_path / "cat.png")
    (tmp_path / "other").mkdir()
    second = save_photo(tmp_path / "other" / "cat.png", "blue")
    assert add_photos(run, [first, second]) == []
    assert sorted(path.name for path in run.photos.iterdir()) == ["cat-2.png", "cat.png"]
    assert Image.open(run.photos / "cat-2.png").getpixel((0, 0)) == (0, 0, 255)


@pytest.mark.parametrize("content", [
    b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>", b"\x80\x04K\x01.", b"", b"GIF89a"])
def test_what_is_no_photo_is_named_and_left_out(tmp_path: Path, run: RunFolder, content: bytes) -> None:
    file = tmp_path / "evil.png"
    file.write_bytes(content)
    refused = add_photos(run, [file, save_photo(tmp_path / "good.png")])
    assert len(refused) == 1
    assert refused[0].startswith("evil.png: ")
    assert str(tmp_path) not in refused[0]
    assert [path.name for path in run.photos.iterdir()] == ["good.png"]


def test_bombs_are_refused_before_they_are_decoded(tmp_path: Path, run: RunFolder) -> None:
    bomb = tmp_path / "bomb.zip"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("zeros", bytes(10_000_000))
    large = tmp_path / "large.png"
    Image.new("1", (22_400, 22_400)).save(large)  # 500 megapixels in 63 KB
    refused = add_photos(run, [bomb, large])
    assert [line.partition(":")[0] for line in refused] == ["bomb.zip", "large.png"]
    assert not any(run.photos.iterdir())


def test_too_many_files_are_refused_at_once(run: RunFolder) -> None:
    with pytest.raises(UserError, match="1000 photos"):
        add_photos(run, ["missing.png"] * 1000)
    assert MOST_PHOTOS < 1000


@given(st.text(max_size=200))
@settings(max_examples=200, deadline=None)
def test_safe_names_stay_in_their_folder(name: str) -> None:
    safe = safe_name(name)
    assert safe and "/" not in safe and "\\" not in safe and not safe.startswith(".") and len(safe) < 100
    assert (Path("/folder") / safe).parent == Path("/folder")
