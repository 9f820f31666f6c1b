"""LoRA files against diffusers and PEFT, which load the same files into the same tiny weights and fuse them."""
from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from helpers.oracles import randomize
from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPTextConfig, CLIPTextModel

from ldm.checkpoints.lora_file import load_lora
from ldm.checkpoints.lora_merging import merge_lora, unmatched_names
from ldm.checkpoints.lora_names import UNET, Layer, Place, name_layers
from ldm.common.errors import UserError
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.modules.encoders.clip import FrozenCLIPEmbedder
from ldm.modules.encoders.openclip import FrozenOpenCLIPEmbedder

WIDTH, TOLERANCE = 16, 1e-5
BLOCKS = "down_blocks.0.attentions.0.transformer_blocks.0"
UNET_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "proj_in", "conv1", "conv_shortcut",
                "time_emb_proj", "downsamplers.0.conv", "upsamplers.0.conv"]
TEXT_TARGETS = ["q_proj", "v_proj", "out_proj", "fc1"]


class Models:
    """A U-Net and a text tower of this project, and the same weights in diffusers and transformers."""

    def __init__(self, unet: nn.Module, tower: nn.Module, folder: Path) -> None:
        self.unet, self.tower = unet, tower
        self.their_unet = UNet2DConditionModel(
            block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=WIDTH, attention_head_dim=2,
            down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2)
        keys = {f"model.diffusion_model.{name}": value for name, value in unet.state_dict().items()}
        self.their_unet.load_state_dict(convert_ldm_unet_checkpoint(keys, self.their_unet.config))
        self.their_tower = CLIPTextModel(tower.transformer.config)
        self.their_tower.load_state_dict(tower.transformer.state_dict())

    def fused_by_diffusers(self, lora: str | Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
        """Return the weights of U-Net and text tower after diffusers has loaded and fused a LoRA."""
        pipe = StableDiffusionPipeline(None, copy.deepcopy(self.their_tower), None, copy.deepcopy(self.their_unet),
                                       None, None, None, requires_safety_checker=False)
        pipe.load_lora_weights(lora if isinstance(lora, str) else dict(lora))
        pipe.fuse_lora(lora_scale=scale)
        pipe.unload_lora_weights()
        return {**{f"unet.{name}": value for name, value in pipe.unet.state_dict().items()},
                **{f"text.{name}": value for name, value in pipe.text_encoder.state_dict().items()}}

    def fused_here(self, path: Path, scale: float) -> dict[str, Tensor]:
        """Return the weights after this project has added the LoRA of a file, by the same names."""
        unet, tower = copy.deepcopy(self.unet), copy.deepcopy(self.tower)
        lora = load_lora(path)
        layers = name_layers(unet, [tower])
        merge_lora(lora, layers, scale)
        assert unmatched_names(lora, layers) == []
        keys = {f"model.diffusion_model.{name}": value for name, value in unet.state_dict().items()}
        theirs = convert_ldm_unet_checkpoint(keys, self.their_unet.config)
        return {**{f"unet.{name}": value for name, value in theirs.items()},
                **{f"text.{name}": value for name, value in tower.transformer.state_dict().items()}}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    folder = tmp_path_factory.mktemp("tower")
    CLIPTextConfig(hidden_size=WIDTH, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
                   vocab_size=49408, max_position_embeddings=16, projection_dim=WIDTH).save_pretrained(folder)
    unet = UNetModel(image_size=8, in_channels=4, out_channels=4, model_channels=32, channel_mult=[1, 2],
                     num_res_blocks=1, attention_resolutions=[1, 2], num_heads=2, use_spatial_transformer=True,
                     transformer_depth=1, context_dim=WIDTH, use_checkpoint=False, legacy=False)
    tower = FrozenCLIPEmbedder(str(folder), max_length=16)
    return Models(randomize(unet, 0, scale=0.1), randomize(tower, 1, scale=0.1), folder)


def random_like(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.2


def layers_of(module: nn.Module, targets: list[str]) -> dict[str, Tensor]:
    """Return the weights of all linear layers and convolutions whose names end as one of the targets does."""
    return {name: layer.weight for name, layer in module.named_modules()
            if isinstance(layer, nn.Linear | nn.Conv2d) and name.endswith(tuple(targets))}


def kohya_layer(name: str, weight: Tensor, seed: int, rank: int = 3) -> dict[str, Tensor]:
    ones = [1] * (weight.ndim - 2)
    return {f"{name}.lora_down.weight": random_like((rank, *weight.shape[1:]), seed),
            f"{name}.lora_up.weight": random_like((len(weight), rank, *ones), seed + 1000),
            f"{name}.alpha": torch.tensor(1.5)}


def kohya_file(models: Models) -> dict[str, Tensor]:
    """Return a LoRA with the names that sd-scripts gives to the layers of diffusers and transformers."""
    tensors = {}
    for seed, (name, weight) in enumerate(layers_of(models.their_unet, UNET_TARGETS).items()):
        tensors |= kohya_layer(f"lora_unet_{name.replace('.', '_')}", weight, seed)
    for seed, (name, weight) in enumerate(layers_of(models.their_tower, TEXT_TARGETS).items()):
        name = f"lora_te_text_model_{name.removeprefix('text_model.').replace('.', '_')}"
        tensors |= kohya_layer(name, weight, seed + 100)
    return tensors


def check_equal(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], before: Mapping[str, Tensor],
                least_changed: int) -> None:
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        assert (ours[name] - weight).abs().max() < TOLERANCE, name
    changed = [name for name in theirs if not torch.equal(theirs[name], before[name])]
    assert len(changed) >= least_changed


def before_of(models: Models) -> dict[str, Tensor]:
    return {**{f"unet.{name}": value for name, value in models.their_unet.state_dict().items()},
            **{f"text.{name}": value for name, value in models.their_tower.state_dict().items()}}


def test_kohya_file_equals_diffusers(models: Models, tmp_path: Path) -> None:
    tensors = kohya_file(models)
    save_file(tensors, tmp_path / "style.safetensors")
    check_equal(models.fused_here(tmp_path / "style.safetensors", 0.7), models.fused_by_diffusers(tensors, 0.7),
                before_of(models), 40)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"use_rslora": True}, {"use_dora": True}, {"alpha_pattern": {"to_q": 7}}])
def test_peft_file_equals_diffusers(models: Models, tmp_path: Path, changes: dict[str, Any]) -> None:
    config = LoraConfig(r=3, lora_alpha=2, target_modules=["to_q", "to_v", "to_out.0", "conv1"],
                        init_lora_weights=False, **changes)
    unet = copy.deepcopy(models.their_unet)
    unet.add_adapter(config)
    text_config = LoraConfig(r=2, lora_alpha=5, target_modules=["q_proj", "fc1"], init_lora_weights=False)
    tower = get_peft_model(copy.deepcopy(models.their_tower), text_config)
    randomize(unet, 5, scale=0.1)  # among others the norms of DoRA
    names = {f"text_model.{name.removeprefix('base_model.model.')}": value
             for name, value in get_peft_model_state_dict(tower).items()}
    StableDiffusionPipeline.save_lora_weights(
        str(tmp_path), get_peft_model_state_dict(unet), names,
        unet_lora_adapter_metadata=config.to_dict(), text_encoder_lora_adapter_metadata=text_config.to_dict())
    check_equal(models.fused_here(tmp_path, 1.0), models.fused_by_diffusers(str(tmp_path), 1.0), before_of(models), 15)


@pytest.mark.slow
def test_attention_processors_of_earlier_diffusers(models: Models, tmp_path: Path) -> None:
    tensors = {}
    for seed, (name, weight) in enumerate(layers_of(models.their_unet, ["to_q", "to_out.0"]).items()):
        name = f"unet.{name.replace('.to_', '.processor.to_').removesuffix('.0')}_lora"
        tensors[f"{name}.down.weight"] = random_like((4, weight.shape[1]), seed)
        tensors[f"{name}.up.weight"] = random_like((len(weight), 4), seed + 50)
    for seed, (name, weight) in enumerate(layers_of(models.their_tower, ["q_proj", "out_proj"]).items()):
        name = f"text_encoder.text_model.{name}".replace("q_proj", "to_q_lora").replace("out_proj", "to_out_lora")
        tensors[f"{name}.down.weight"] = random_like((4, weight.shape[1]), seed + 100)
        tensors[f"{name}.up.weight"] = random_like((len(weight), 4), seed + 150)
    save_file(tensors, tmp_path / "old.safetensors")
    check_equal(models.fused_here(tmp_path / "old.safetensors", 0.5), models.fused_by_diffusers(tensors, 0.5),
                before_of(models), 12)
    # the same of a U-Net alone, in a pickle and without prefixes
    torch.save({name.removeprefix("unet."): value for name, value in tensors.items() if name.startswith("unet.")},
               tmp_path / "old.bin")
    alone = models.fused_here(tmp_path / "old.bin", 0.5)
    together = models.fused_here(tmp_path / "old.safetensors", 0.5)
    assert all(torch.equal(alone[name], together[name]) for name in alone if name.startswith("unet."))


def test_names_of_compvis_and_of_diffusers_are_the_same_layers(models: Models, tmp_path: Path) -> None:
    # SDXL's sd-scripts train the U-Net of sgm, whose names come from the model itself
    named = dict(models.unet.named_modules())
    ours = {name: module.weight for name, module in named.items() if isinstance(module, nn.Linear | nn.Conv2d)}
    theirs = {id_of(weight): name for name, weight in layers_of(models.their_unet, [""]).items()}
    one, other = {}, {}
    for seed, (name, weight) in enumerate(ours.items()):
        one |= kohya_layer(f"lora_unet_{name.replace('.', '_')}", weight, seed)
        other |= kohya_layer(f"lora_unet_{theirs[id_of(weight)].replace('.', '_')}", weight, seed)
    assert len(ours) == len(theirs) and one.keys() != other.keys()
    save_file(one, tmp_path / "sgm.safetensors")
    save_file(other, tmp_path / "diffusers.safetensors")
    results = [models.fused_here(tmp_path / f"{kind}.safetensors", 1.0) for kind in ("sgm", "diffusers")]
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def id_of(weight: Tensor) -> tuple[float, ...]:
    return tuple(weight.detach().flatten()[:3].tolist())


@pytest.mark.slow
@pytest.mark.parametrize("make", [LoHaConfig, LoKrConfig])
def test_lycoris_equals_peft(models: Models, tmp_path: Path, make: Callable[..., Any]) -> None:
    config = make(r=3, alpha=2, target_modules=["to_q", "conv1"], init_weights=False)
    theirs = get_peft_model(copy.deepcopy(models.their_unet), config)
    tensors = {name.replace("base_model.model.", "lycoris_").replace(".", "_", name.count(".") - 3): value
               for name, value in get_peft_model_state_dict(theirs).items()}
    layers = {name.rpartition(".")[0] for name in tensors}
    save_file(tensors | {f"{layer}.alpha": torch.tensor(2.0) for layer in layers}, tmp_path / "x.safetensors")
    merged = theirs.merge_and_unload().state_dict()
    check_equal(models.fused_here(tmp_path / "x.safetensors", 1.0),
                {**before_of(models), **{f"unet.{name}": value for name, value in merged.items()}},
                before_of(models), 10)


def merge_one(parts: Mapping[str, Tensor], weight: Tensor, tmp_path: Path, scale: float = 1.0) -> Tensor:
    """Return a weight after the LoRA of one layer with these parts."""
    save_file({f"lora_unet_x.{name}": value.clone() for name, value in parts.items()}, tmp_path / "one.safetensors")
    target = weight.clone()
    merge_lora(load_lora(tmp_path / "one.safetensors"), {Place(UNET, "x"): Layer(target)}, scale)
    return target


def test_locon_is_three_convolutions_in_a_row(tmp_path: Path) -> None:
    down, mid, up = random_like((3, 5, 1, 1), 0), random_like((3, 3, 3, 3), 1), random_like((7, 3, 1, 1), 2)
    weight, x = random_like((7, 5, 3, 3), 3), random_like((2, 5, 6, 6), 4)
    merged = merge_one({"lora_down.weight": down, "lora_mid.weight": mid, "lora_up.weight": up,
                        "alpha": torch.tensor(6.0)}, weight, tmp_path, 0.5)
    chain = functional.conv2d(functional.conv2d(functional.conv2d(x, down), mid, padding=1), up)
    expected = functional.conv2d(x, weight, padding=1) + 0.5 * 2 * chain
    assert (functional.conv2d(x, merged, padding=1) - expected).abs().max() < TOLERANCE


def test_convolutions_of_loha_and_lokr(tmp_path: Path) -> None:
    weight = random_like((6, 4, 3, 3), 0)
    a, b, core = random_like((2, 6), 1), random_like((2, 4), 2), random_like((2, 2, 3, 3), 3)
    factor = torch.zeros(6, 4, 3, 3)
    for i in range(2):
        for j in range(2):
            factor += torch.einsum("p,d,kl->pdkl", a[i], b[j], core[i, j])
    loha = {"hada_w1_a": a, "hada_w1_b": b, "hada_t1": core, "hada_w2_a": a, "hada_w2_b": b, "hada_t2": core}
    assert (merge_one(loha, weight, tmp_path) - weight - factor ** 2).abs().max() < TOLERANCE
    small, large = random_like((2, 2), 4), random_like((3, 2, 3, 3), 5)
    expected = weight.clone()
    for p in range(6):
        for d in range(4):
            expected[p, d] += small[p // 3, d // 2] * large[p % 3, d % 2]
    assert (merge_one({"lokr_w1": small, "lokr_w2": large}, weight, tmp_path) - expected).abs().max() < TOLERANCE


def test_dora_of_lycoris_restores_the_norms_of_columns(tmp_path: Path) -> None:
    weight, norms = random_like((6, 4, 3, 3), 0), random_like((1, 4, 1, 1), 1).abs()
    delta = {"lora_down.weight": random_like((2, 4, 3, 3), 2), "lora_up.weight": random_like((6, 2, 1, 1), 3)}
    merged = merge_one({**delta, "dora_scale": norms}, weight, tmp_path)
    assert torch.allclose(merged.transpose(0, 1).flatten(1).norm(dim=1), norms.flatten(), atol=TOLERANCE)
    half = merge_one({**delta, "dora_scale": norms}, weight, tmp_path, 0.5)
    assert torch.allclose(half, (weight + merged) / 2, atol=TOLERANCE)


def test_whole_differences_of_weights_norms_and_biases(tmp_path: Path) -> None:
    tensors = {"lora_unet_x.diff": random_like((3, 2), 0), "lora_unet_x.diff_b": random_like((3,), 1),
               "lora_unet_norm.w_norm": random_like((3,), 2), "lora_unet_norm.b_norm": random_like((3,), 3)}
    save_file(tensors, tmp_path / "full.safetensors")
    zeros = {name: Layer(torch.zeros(shape), torch.zeros(3)) for name, shape in (("x", (3, 2)), ("norm", (3,)))}
    merge_lora(load_lora(tmp_path / "full.safetensors"), {Place(UNET, name): layer for name, layer in zeros.items()}, 2)
    assert torch.equal(zeros["x"].weight, 2 * tensors["lora_unet_x.diff"])
    assert torch.equal(zeros["x"].bias, 2 * tensors["lora_unet_x.diff_b"])
    assert torch.equal(zeros["norm"].weight, 2 * tensors["lora_unet_norm.w_norm"])
    assert torch.equal(zeros["norm"].bias, 2 * tensors["lora_unet_norm.b_norm"])


def test_second_tower_of_open_clip_equals_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import open_clip

    shape = {"context_length": 16, "vocab_size": 49408, "width": WIDTH, "heads": 2, "layers": 2}
    vision = {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16}
    monkeypatch.setattr(open_clip, "get_model_config", lambda _: {
        "embed_dim": 12, "text_cfg": shape, "vision_cfg": vision})
    tower = randomize(FrozenOpenCLIPEmbedder("tiny", max_length=16), 3, scale=0.1)
    theirs = CLIPTextModel(CLIPTextConfig(
        hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=2, num_attention_heads=2, vocab_size=49408,
        max_position_embeddings=16, hidden_act="gelu", eos_token_id=49407))
    copy_tower(tower.model, theirs)
    tensors = {}
    for seed, (name, weight) in enumerate(layers_of(theirs, ["_proj", "fc1", "fc2"]).items()):
        short = name.removeprefix("text_model.")
        added = kohya_layer(f"lora_te2_text_model_{short.replace('.', '_')}", weight, seed)
        tensors |= added
        down, up = (added[key] for key in added if not key.endswith("alpha"))
        weight.data += 0.5 * up @ down  # alpha 1.5, rank 3
    added = kohya_layer("lora_te2_text_projection", torch.zeros(12, WIDTH), 90)
    tensors |= added
    save_file(tensors, tmp_path / "te2.safetensors")
    projection = tower.model.text_projection.clone()
    lora, layers = load_lora(tmp_path / "te2.safetensors"), name_layers(nn.Module(), [nn.Module(), tower])
    assert merge_lora(lora, layers, 1.0).total() == 13 and not unmatched_names(lora, layers)
    tokens = torch.tensor([[49406, 320, 1125, 539, 49407, *[0] * 11]])
    assert (tower.encode_tokens(tokens) - theirs(tokens).last_hidden_state).abs().max() < TOLERANCE
    delta = added["lora_te2_text_projection.lora_up.weight"] @ added["lora_te2_text_projection.lora_down.weight"]
    assert (tower.model.text_projection - projection - 0.5 * delta.T).abs().max() < TOLERANCE


def copy_tower(model: Any, theirs: nn.Module) -> None:
    """Copy open_clip's weights to a tower of transformers, layer by layer."""
    theirs.get_input_embeddings().weight.data.copy_(model.token_embedding.weight)
    theirs.embeddings.position_embedding.weight.data.copy_(model.positional_embedding)
    theirs.final_layer_norm.load_state_dict(model.ln_final.state_dict())
    for block, layer in zip(model.transformer.resblocks, theirs.encoder.layers, strict=True):
        layer.layer_norm1.load_state_dict(block.ln_1.state_dict())
        layer.layer_norm2.load_state_dict(block.ln_2.state_dict())
        layer.self_attn.out_proj.load_state_dict(block.attn.out_proj.state_dict())
        layer.mlp.fc1.load_state_dict(block.mlp.c_fc.state_dict())
        layer.mlp.fc2.load_state_dict(block.mlp.c_proj.state_dict())
        for index, name in enumerate(("q_proj", "k_proj", "v_proj")):
            projection = getattr(layer.self_attn, name)
            projection.weight.data.copy_(block.attn.in_proj_weight[index * WIDTH:(index + 1) * WIDTH])
            projection.bias.data.copy_(block.attn.in_proj_bias[index * WIDTH:(index + 1) * WIDTH])


KEY = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"


@pytest.mark.parametrize(("tensors", "named"), [
    ({f"{KEY}.lora_down.weight": torch.zeros(4, 768), f"{KEY}.lora_up.weight": torch.zeros(32, 4)},
     "is a LoRA for Stable Diffusion 1.x .* does not fit a latent diffusion model of context 16: "),
    ({f"{KEY}.lora_down.weight": torch.zeros(4, 16), f"{KEY}.lora_up.weight": torch.zeros(32, 8)},
     r"is damaged at lora_unet.*do not fit together \(down \(4, 16\), up \(32, 8\)\)"),
    ({f"{KEY}.lora_down.weight": torch.zeros(4, 16)}, "is damaged at lora_unet"),
    ({f"{KEY}.lora_down.weight": torch.full((4, 16), torch.nan), f"{KEY}.lora_up.weight": torch.zeros(32, 4)},
     "not finite"),
    ({"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": torch.zeros(4, 3072),
      "lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight": torch.zeros(9216, 4)},
     "is a LoRA for a diffusion transformer, such as Flux .*, of which no layer is in a latent diffusion model"),
    ({"lora_te2_text_model_encoder_layers_30_mlp_fc1.lora_down.weight": torch.zeros(4, 1280),
      "lora_te2_text_model_encoder_layers_30_mlp_fc1.lora_up.weight": torch.zeros(5120, 4)},
     "is a LoRA for a model of two text encoders, such as Stable Diffusion XL, of which no layer"),
    ({"lora_unet_x.oft_blocks": torch.zeros(2, 2, 2)}, "is a LoRA for another kind of model, of which no layer"),
    ({}, "holds no weights"),
])
def test_loras_that_do_not_fit(models: Models, tmp_path: Path, tensors: dict[str, Tensor], named: str) -> None:
    save_file(tensors, tmp_path / "bad.safetensors")
    with pytest.raises(UserError, match=named):
        models.fused_here(tmp_path / "bad.safetensors", 1.0)


@pytest.mark.slow
def test_folder_of_peft_has_its_alpha(models: Models, tmp_path: Path) -> None:
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["attn2.to_k"], init_lora_weights=False)
    theirs = get_peft_model(copy.deepcopy(models.their_unet), config)
    theirs.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["lora_alpha"] == 8
    merged = theirs.merge_and_unload().state_dict()
    check_equal(models.fused_here(tmp_path, 1.0),
                {**before_of(models), **{f"unet.{name}": value for name, value in merged.items()}},
                before_of(models), 5)
    with pytest.raises(UserError, match="a folder without a LoRA"):
        load_lora(tmp_path.parent)
