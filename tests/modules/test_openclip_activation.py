"""QuickGELU or GELU: what the pretrained weights of `open_clip` need, against their list and a tower built by hand."""
from __future__ import annotations

import json
from pathlib import Path

import open_clip
import pytest
import torch
from open_clip import factory, pretrained

from ldm.common.errors import UserError
from ldm.models.clip_encoder import ClipEncoder
from ldm.models.open_clip_folder import SETTINGS, load_openclip
from ldm.modules.encoders.clip_features import load_clip
from ldm.modules.encoders.openclip_activation import check_activation, needs_quick_gelu

TINY = {"embed_dim": 16, "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8, "head_width": 32},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}}


@pytest.mark.parametrize(("name", "needed"), [
    ("ViT-B-32/openai", True), ("ViT-B-32/laion400m_e32", True), ("ViT-B-16/laion400m_e32", False),
    ("ViT-B-32/metaclip_400m", True), ("ViT-H-14/dfn5b", True), ("ViT-B-32/laion2b_s34b_b79k", False),
    ("RN50/cc12m", True), ("ViT-L-14/datacomp_xl_s13b_b90k", False)])
def test_the_tag_decides(name: str, needed: bool) -> None:
    assert needs_quick_gelu(*name.split("/")) == needed


@pytest.mark.parametrize(("tag", "quick"), [("openai", True), ("laion400m_e31", True), ("laion2b_e16", False)])
def test_towers_compute_what_the_weights_were_trained_for(
    tag: str, quick: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setitem(factory._MODEL_CONFIGS, "ViT-B-32", TINY)
    monkeypatch.setitem(factory._MODEL_CONFIGS, "ViT-B-32-quickgelu", {**TINY, "quick_gelu": True})
    torch.manual_seed(0)
    trained = open_clip.CLIP(quick_gelu=quick, **TINY).eval()
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if "mlp" in name:
                parameter.mul_(6)  # as in trained towers, which are far from linear
    torch.save(trained.state_dict(), tmp_path / "weights.pt")
    for module in (factory, pretrained):
        monkeypatch.setattr(module, "download_pretrained", lambda *_, **__: str(tmp_path / "weights.pt"))
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = trained.encode_image(images)
        for model in (ClipEncoder.from_path(f"ViT-B-32/{tag}").model, load_clip(f"ViT-B-32/{tag}")):
            assert torch.allclose(model.encode_image(images), expected, atol=1e-6)
    assert not [warning for warning in recwarn if "GELU" in str(warning.message)]


def written(folder: Path, architecture: str, quick: bool) -> Path:
    folder.mkdir(parents=True)
    config = {**open_clip.get_model_config(architecture), "quick_gelu": quick}
    (folder / SETTINGS).write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    return folder


@pytest.mark.parametrize(("name", "quick"), [
    ("ViT-B-32-openai", True), ("vit_base_patch32_clip_224.openai", True), ("ViT-B-32_laion400m_e32", True),
    ("ViT-B-32-laion2b_s34b_b79k", False), ("models--timm--vit_base_patch32_clip_224.metaclip_400m", True)])
def test_folders_named_after_weights_are_checked(name: str, quick: bool, tmp_path: Path) -> None:
    check_activation(written(tmp_path / "right" / name, "ViT-B-32", quick), SETTINGS)
    wrong = written(tmp_path / "wrong" / name, "ViT-B-32", not quick)
    needed = "QuickGELU" if quick else "GELU"
    with pytest.raises(UserError, match=f'need {needed}; set "quick_gelu": {str(quick).lower()}'):
        load_openclip(wrong)


@pytest.mark.parametrize("name", ["clip", "my_openairport", "laion400m"])
def test_folders_that_tell_nothing_are_not_refused(name: str, tmp_path: Path) -> None:
    for quick in (False, True):
        check_activation(written(tmp_path / str(quick) / name, "ViT-B-32", quick), SETTINGS)
