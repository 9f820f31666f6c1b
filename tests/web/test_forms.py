"""What the forms make of their values, whoever sends them. Needs Gradio."""
from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

pytest.importorskip("gradio", reason="the page needs gradio")
pytestmark = pytest.mark.slow  # Gradio takes seconds to import

from ldm.common.errors import MemoryShortage, UserError  # noqa: E402
from ldm.inference.output_folder import OutputFolder  # noqa: E402
from ldm.inference.settings import GenerationSettings, ModelSettings  # noqa: E402
from ldm.web.choice import choice  # noqa: E402
from ldm.web.endpoints import uploaded  # noqa: E402
from ldm.web.generate_form import OWN_BIAS, OWN_SPACING, SET_BIAS, Values  # noqa: E402
from ldm.web.generate_tab import split_editor  # noqa: E402
from ldm.web.messages import MEMORY, as_html, as_message  # noqa: E402
from ldm.web.recalled_settings import recall, stored_settings, stored_sources  # noqa: E402
from ldm.web.site import SiteSettings  # noqa: E402
from ldm.web.teach_form import TeachValues  # noqa: E402

NAN = float("nan")
VALUES = Values("a dog", "", ["teddy"], OWN_BIAS, 0.6, 0, False, "ddim", OWN_SPACING, 15, 2, 0, 0, -1, 4, 0.75)
SITE = SiteSettings(Path("runs"), "configs/perfusion.yaml", ModelSettings("models/mini/config.yaml"))
TEACH = TeachValues("teddy bear")


def test_settings_of_the_form() -> None:
    assert VALUES.settings() == GenerationSettings(15, 2.0, "ddim")
    assert VALUES.chosen_seed() is None
    moved = VALUES._replace(bias_mode=SET_BIAS, temperature=0.2, seed=7, height=128, spacing="karras")
    assert moved.settings() == GenerationSettings(15, 2.0, "ddim", height=128, bias=0.6, temperature=0.2,
                                                  timestep_spacing="karras")
    assert moved.chosen_seed() == 7
    assert moved._replace(concepts=[]).settings().bias is None


@pytest.mark.parametrize(("name", "value"), [
    ("bias", NAN), ("bias", -1), ("temperature", NAN), ("steps", 0), ("steps", 1e9), ("guidance", -3),
    ("height", -64), ("width", 1e6), ("bias_mode", "/etc/passwd")])
def test_values_out_of_range_are_refused(name: str, value: Any) -> None:
    with pytest.raises(UserError):
        VALUES._replace(**{name: value}).settings()


@pytest.mark.parametrize("seed", [-2, NAN, 1e20, 0.5])
def test_what_is_no_seed_is_refused(seed: float) -> None:
    with pytest.raises(UserError, match="seed"):
        VALUES._replace(seed=seed).chosen_seed()


def test_settings_of_a_run() -> None:
    settings = TEACH.settings(SITE, 200)
    assert (settings.placeholder, settings.title, settings.max_steps) == ("<my-teddy-bear>", "<my-teddy-bear>", 200)
    assert TEACH._replace(preset="quick").settings(SITE, 200).max_steps == 100
    assert TEACH._replace(preset="thorough").settings(SITE, 200).max_steps == 400
    assert TEACH._replace(steps=7).settings(SITE, 200).max_steps == 7


@pytest.mark.parametrize(("preset", "config"), [
    ("seconds", "configs/perfusion-fast.yaml"), ("closer", "configs/perfusion-scenes.yaml")])
def test_presets_with_a_config_of_their_own(preset: str, config: str) -> None:
    settings = TEACH._replace(preset=preset).settings(SITE, 200)
    assert settings.config == config
    assert settings.max_steps is None and not settings.overrides  # those of the config
    assert TEACH._replace(preset=preset, steps=30).settings(SITE, 200).max_steps == 30


def test_other_models_are_not_taught_in_seconds() -> None:
    site = replace(SITE, base="configs/perfusion-sd-v1.yaml")
    with pytest.raises(UserError, match="Choose one of quick, balanced, thorough"):
        TEACH._replace(preset="seconds").settings(site, 400)


@pytest.mark.parametrize(("name", "value", "message"), [
    ("kind", None, "what is it"), ("kind", " ", "what is it"), ("kind", "x" * 100, "at most 60"),
    ("word", "x" * 100, "at most 60"), ("preset", "../x", "quick, balanced, thorough, seconds, closer"),
    ("steps", NAN, "steps"), ("steps", -1, "steps"), ("seed", -1, "seed"), ("title", "x" * 100, "1 to 60")])
def test_bad_values_of_a_run_are_named(name: str, value: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        TEACH._replace(**{name: value}).settings(SITE, 200)


def test_settings_come_back_from_an_image(tmp_path: Path) -> None:
    stored = {"prompt": "a <my-teddy>", "seed": 12, "negative_prompt": "snow", "sampler": "dpm", "height": 64,
              "num_inference_steps": 9, "guidance_scale": 3.5, "global_locking": True, "strength": 0.5,
              "concepts": [{"source": "teddy.safetensors", "bias": 0.45, "temperature": 0.1}]}
    path = OutputFolder(tmp_path, 1, with_sheets=False).add(Image.new("RGB", (8, 8)), "", stored)
    metadata = stored_settings(str(path))
    assert stored_sources(metadata) == ["teddy.safetensors"]
    recalled = recall(metadata, VALUES, ["teddy.safetensors"], [])
    assert recalled == Values("a <my-teddy>", "snow", ["teddy.safetensors"], SET_BIAS, 0.45, 0.1, True, "dpm",
                              OWN_SPACING, 9, 3.5, 64, 0, 12, 4, 0.5)


@pytest.mark.parametrize("stored", [
    {"prompt": "a", "sampler": "../x", "num_inference_steps": NAN, "guidance_scale": "2", "height": -5, "seed": 1e30,
     "concepts": "x"},
    {"prompt": "a", "concepts": [7, {"source": {"a": 1}, "bias": "high", "temperature": [1]}], "seed": True}])
def test_hostile_settings_in_an_image_are_left_out(tmp_path: Path, stored: dict[str, Any]) -> None:
    path = OutputFolder(tmp_path, 1, with_sheets=False).add(Image.new("RGB", (8, 8)), "", stored)
    metadata = stored_settings(str(path))
    stored_sources(metadata)
    assert recall(metadata, VALUES, [], []) == VALUES._replace(prompt="a", concepts=[])


@pytest.mark.parametrize("content", [b"", b"\x80\x04K\x01.", b"<svg/>"])
def test_files_without_settings_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(UserError, match="no settings"):
        stored_settings(str(tmp_path / "x.png"))


def test_the_painted_part_is_the_mask() -> None:
    image, layer = Image.new("RGB", (20, 10), "red"), Image.new("RGBA", (20, 10), (0, 0, 0, 0))
    assert split_editor(None) == (None, None)
    assert split_editor({"background": Image.new("RGBA", (4, 4), (0, 0, 0, 0)), "layers": []}) == (None, None)
    assert split_editor({"background": image, "layers": [layer]})[1] is None
    layer.paste((255, 255, 255, 255), (0, 0, 10, 10))
    background, mask = split_editor({"background": image, "layers": [layer], "composite": None})
    assert background.getpixel((0, 0)) == (255, 0, 0)
    assert mask.getpixel((3, 3)) == 255 and mask.getpixel((15, 3)) == 0


def test_messages_are_one_line_of_text() -> None:
    assert as_message(UserError("<b>:\nno")).message == "&lt;b&gt;: no"
    assert as_message(MemoryShortage("cpu has no memory")).message == MEMORY
    assert as_message(RuntimeError("CUDA out of memory. Tried to allocate")).message == MEMORY
    assert as_message(KeyError("secret")).message == "something went wrong (KeyError); the terminal says more"
    assert as_html(["<b>", "c"]) == "&lt;b&gt;<br>c"


def test_only_uploads_are_photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uploads = tmp_path / "uploads"
    uploads.mkdir()
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(uploads))
    (uploads / "cat.png").touch()
    (tmp_path / "secret.png").touch()
    (uploads / "link.png").symlink_to(tmp_path / "secret.png")
    assert uploaded({"path": str(uploads / "cat.png")}) == uploads / "cat.png"
    for path in ("/etc/passwd", str(tmp_path / "secret.png"), str(uploads / "../secret.png"), "", uploads / "link.png"):
        with pytest.raises(UserError, match="no uploaded file"):
            uploaded({"path": str(path)})


def test_dropdowns_pass_on_texts_only() -> None:
    one, several = choice(label="Run"), choice(label="Concepts", multiselect=True)
    assert one.preprocess("not in the list") == "not in the list"
    assert one.preprocess({"path": "/etc/passwd"}) is None
    assert several.preprocess(["a", 7]) == ["a"]
    assert several.preprocess("a") == []
