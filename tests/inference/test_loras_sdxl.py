"""A LoRA for SDXL as sd-scripts writes it, with both text encoders, against diffusers' loading and fusing of it."""
from __future__ import annotations

from pathlib import Path

import pytest
import sdxl
import torch
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from safetensors.torch import save_file
from torch import Tensor, nn

from ldm.common.errors import UserError
from ldm.inference.loras import add_loras

TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out")
TEXT_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")


def lora_of(prefix: str, module: nn.Module, targets: tuple[str, ...], generator: torch.Generator) -> dict[str, Tensor]:
    """Return random matrices for all linear layers whose names end as one of the targets does."""
    tensors = {}
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear) and name.endswith(targets):
            start = prefix + name.removeprefix("text_model.").replace(".", "_")
            tensors[f"{start}.lora_down.weight"] = torch.randn(4, layer.in_features, generator=generator) * 0.1
            tensors[f"{start}.lora_up.weight"] = torch.randn(layer.out_features, 4, generator=generator) * 0.1
            tensors[f"{start}.alpha"] = torch.tensor(2.0)
    return tensors


@pytest.mark.slow
def test_weights_and_encodings_equal_those_of_diffusers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = sdxl.small_model().requires_grad_(False)
    pipe = sdxl.as_diffusers(model)
    generator = torch.Generator().manual_seed(0)
    tensors = lora_of("lora_unet_", model.model.diffusion_model, TARGETS, generator)
    tensors |= lora_of("lora_te1_text_model_", pipe.text_encoder, TEXT_TARGETS, generator)
    tensors |= lora_of("lora_te2_text_model_", pipe.text_encoder_2, TEXT_TARGETS, generator)
    save_file(tensors, tmp_path / "xl.safetensors")
    pipe.load_lora_weights(dict(tensors))
    pipe.fuse_lora(lora_scale=0.6)
    pipe.unload_lora_weights()
    caplog.set_level("INFO")
    add_loras(model, [f"{tmp_path}/xl.safetensors:0.6"])
    assert "layers of the U-Net, 36 of the text encoder" in caplog.text and "fit no layer" not in caplog.text

    ours = convert_ldm_unet_checkpoint(sdxl.public_state(model), sdxl.UNET_CONFIG)
    theirs = pipe.unet.state_dict()
    assert ours.keys() == theirs.keys() and all((ours[name] - theirs[name]).abs().max() < 1e-5 for name in theirs)
    encoding, pooled = model.cond_stage_model.encode_with_pooled(model.cond_stage_model.tokenize(["a red cat"]))
    expected, _, expected_pooled, _ = pipe.encode_prompt("a red cat", do_classifier_free_guidance=False)
    assert (encoding - expected).abs().max() < 1e-4 and (pooled - expected_pooled).abs().max() < 1e-4


def test_a_lora_of_stable_diffusion_1_is_named(tmp_path: Path) -> None:
    name = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
    save_file({f"{name}.lora_down.weight": torch.zeros(4, 768), f"{name}.lora_up.weight": torch.zeros(640, 4)},
              tmp_path / "sd1.safetensors")
    with pytest.raises(UserError, match=r"is a LoRA for Stable Diffusion 1.x \(context 768\), which does not fit"):
        add_loras(sdxl.small_model(), [tmp_path / "sd1.safetensors"])
