"""The draft: a folder that keeps photos and form until the run is put into the queue."""
from __future__ import annotations

from pathlib import Path

import pytest

from ldm.common.errors import UserError
from ldm.web.draft import FORM, Draft
from ldm.web.run_folder import RunSettings
from ldm.web.run_queue import RunQueue

SETTINGS = RunSettings("My teddy", "teddy bear", "<my-teddy>", "configs/perfusion.yaml")


@pytest.fixture
def draft(tmp_path: Path) -> Draft:
    return Draft(RunQueue(tmp_path / "runs"))


def test_a_draft_is_found_again_by_another_page(draft: Draft) -> None:
    assert draft.find() is None
    assert draft.read_form() == {}
    run = draft.find_or_create()
    draft.write_form({"kind": "teddy bear"})
    other = Draft(RunQueue(draft.queue.root))
    assert other.find_or_create() == run
    assert other.read_form() == {"kind": "teddy bear"}


def test_a_run_with_settings_is_no_draft(draft: Draft) -> None:
    draft.find_or_create().write_settings(SETTINGS)
    assert draft.find() is None
    assert [run.read_settings() for run in draft.queue.prepared_runs()] == [SETTINGS]


def test_a_draft_without_photos_cannot_be_taught(draft: Draft) -> None:
    with pytest.raises(UserError, match="no photos yet"):
        draft.with_photos()
    draft.find_or_create()
    with pytest.raises(UserError, match="no photos yet"):
        draft.with_photos()


@pytest.mark.parametrize("text", ["{", "[]", "\0"])
def test_a_damaged_form_is_empty(draft: Draft, text: str) -> None:
    (draft.find_or_create().path / FORM).write_text(text)
    assert draft.read_form() == {}


def test_discarding_removes_the_folder(draft: Draft) -> None:
    run = draft.find_or_create()
    draft.discard()
    assert not run.path.exists()
    draft.discard()


def test_photos_are_left_out_and_used_again(draft: Draft) -> None:
    run = draft.find_or_create()
    (run.photos / "cat.png").write_bytes(b"")
    run.toggle_photo("cat.png")
    assert (run.left_out / "cat.png").is_file() and not any(run.photos.iterdir())
    run.toggle_photo("../left_out/cat.png")
    assert (run.photos / "cat.png").is_file()
    with pytest.raises(UserError, match="gone"):
        run.toggle_photo("../form.json")
