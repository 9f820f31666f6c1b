"""Every config of a public model builds, and a small version of each kind trains."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from helpers import stand_ins
from helpers.stand_ins import ROOT, model_section, stand_in
from torch import Tensor

from ldm.util import count_params, instantiate_from_config

FOLDERS = ("configs/stable-diffusion/*.yaml", "configs/latent-diffusion/*.yaml", "configs/perfusion-ldm.yaml",
           "configs/perfusion-sd*.yaml", "models/ldm/*/config.yaml")
CONFIGS = sorted(str(path.relative_to(ROOT)) for pattern in FOLDERS for path in ROOT.glob(pattern))
BASES = [name for name in CONFIGS if model_section(name)["target"].endswith(".LatentDiffusion")
         and "personalization_config" not in model_section(name)["params"]]
# Millions of parameters, as the authors' code prints them at its start.
SIZES = {
    "configs/latent-diffusion/cin256-v2.yaml": 400.92, "configs/latent-diffusion/celebahq-ldm-vq-4.yaml": 274.06,
    "configs/latent-diffusion/lsun_churches-ldm-kl-8.yaml": 294.97,
    "configs/latent-diffusion/txt2img-1p4B-eval.yaml": 872.30,
    "configs/stable-diffusion/v1-inference.yaml": 859.52, "configs/stable-diffusion/v2-inference.yaml": 865.91,
}


def structure(name: str) -> str:
    """Return a text that is equal for configs whose small versions would be equal."""
    params = model_section(name)["params"]
    parts = {key: params.get(key) for key in ("conditioning_key", "concat_mode", "parameterization", "scale_by_std")}
    unet = {key: value for key, value in params["unet_config"]["params"].items()
            if not key.startswith(("model_channels", "context_dim", "num_head", "image_size"))}
    stage, encoder = params["first_stage_config"], params["cond_stage_config"]
    return str((parts, unet, stage["target"], encoder if isinstance(encoder, str) else encoder["target"]))


ONE_OF_EACH = list({structure(name): name for name in reversed(BASES)}.values())


def built_on_meta(section: dict[str, Any]) -> Any:
    with torch.device("meta"):
        return instantiate_from_config(section)


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_builds(name: str) -> None:
    section = model_section(name)
    model = built_on_meta(section)
    params = section["params"]
    assert model.model.diffusion_model.in_channels >= model.channels == params["channels"]
    assert model.latent_shape[1:] == (params["image_size"],) * 2
    stage = params["first_stage_config"]["params"]["embed_dim"]
    assert stage == model.channels
    if name in SIZES:
        assert count_params(model.model.diffusion_model) / 1e6 == pytest.approx(SIZES[name], abs=0.01)


def trained(section: dict[str, Any], batch: dict[str, Any], root: Path) -> tuple[Any, dict[str, Tensor]]:
    """Train for one step. Return the model, and its weights before the step."""
    torch.manual_seed(0)
    model = instantiate_from_config(section)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    trainer = pl.Trainer(max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False,
                         enable_progress_bar=False, enable_model_summary=False, default_root_dir=root)
    trainer.fit(model, torch.utils.data.DataLoader([batch], batch_size=None))
    assert torch.isfinite(trainer.callback_metrics["train/loss"])
    return model, before


@pytest.mark.slow
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_a_small_version_of_every_base_model_trains(name: str, tmp_path: Path) -> None:
    section = stand_in(name, tmp_path)
    batch = stand_ins.batch_for(section)
    # Without the public warm-up, so that one step changes the weights.
    section["params"].pop("scheduler_config", None)
    model, before = trained(section, batch, tmp_path)
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert {"model.diffusion_model.out.2.weight", "model.diffusion_model.out.2.bias"} <= changed
    assert not any(key.startswith("first_stage_model.") for key in changed)
    cond = section["params"]["cond_stage_config"]
    trains_it = section["params"].get("cond_stage_trainable", False) and isinstance(cond, dict)
    encoder_changed = any(key.startswith("cond_stage_model.") for key in changed)
    assert encoder_changed == trains_it
    expected = {"model.", "model_ema."} | ({"cond_stage_model."} if trains_it else set())
    assert {key.split(".")[0] + "." for key in changed} - {"scale_factor."} <= expected
    _, c, x, *_ = model.eval().get_input(batch, model.first_stage_key, return_first_stage_outputs=True,
                                         force_c_encode=True)
    assert model.sample_images(c, 2, 2).shape == x.shape


@pytest.mark.slow
def test_class_labels_reach_the_network(tmp_path: Path) -> None:
    section = stand_in("configs/latent-diffusion/cin256-v2.yaml", tmp_path)
    model = instantiate_from_config(section).eval()
    torch.nn.init.normal_(model.model.diffusion_model.out[2].weight)
    for block in model.model.diffusion_model.modules():
        if type(block).__name__ == "SpatialTransformer":
            torch.nn.init.normal_(block.proj_out.weight)
    x, t = torch.randn(1, 3, 8, 8).expand(2, -1, -1, -1), torch.tensor([5, 5])
    one, other = (model.apply_model(x, t, model.get_learned_conditioning({"class_label": torch.tensor(labels)}))
                  for labels in ([7, 1000], [7, 3]))  # class 1000 stands for no class
    assert torch.allclose(one[0], other[0]) and not torch.allclose(one[1], other[1], atol=1e-4)
