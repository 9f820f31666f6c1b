"""Steps of other methods from `diffusers`' and `peft`'s parts, as the example scripts of `diffusers` make them.

Source: huggingface/diffusers, examples/textual_inversion/textual_inversion.py and examples/text_to_image/
train_text_to_image_lora.py and train_text_to_image.py, on CUDA with `--mixed_precision bf16`, which has what is frozen
in 16 bits: pictures through the first stage in every step, AdamW, gradients clipped at 1 where those scripts do so.
"""
from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ldm.common.errors import UserError
from scripts.benchmarks.device import mixed_precision, precision
from scripts.benchmarks.random_models import filled

TRAINING_STEPS = 1000
LORA_RANK = 4
LARGEST_GRADIENT = 1.0
LORA_LAYERS = ("to_q", "to_k", "to_v", "to_out.0")


def need(*packages: str) -> None:
    """Raises a UserError for a package that is not installed."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise UserError(f"{package} is not installed: pip install -e \".[benchmark]\"")


def unet_settings(params: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of `diffusers`' U-Net for the shape that a config's `unet_config.params` describe."""
    levels = range(len(params["channel_mult"]))
    widths = [params["model_channels"] * factor for factor in params["channel_mult"]]
    reads = [2**level in params["attention_resolutions"] for level in levels]
    heads = [params["num_heads"]] * len(widths) if "num_heads" in params else [
        width // params["num_head_channels"] for width in widths]
    return {"in_channels": params["in_channels"], "out_channels": params["out_channels"],
            "block_out_channels": tuple(widths), "layers_per_block": params["num_res_blocks"],
            "attention_head_dim": tuple(heads), "cross_attention_dim": params["context_dim"],
            "down_block_types": tuple("CrossAttnDownBlock2D" if read else "DownBlock2D" for read in reads),
            "up_block_types": tuple("CrossAttnUpBlock2D" if read else "UpBlock2D" for read in reversed(reads)),
            "use_linear_projection": params.get("use_linear_in_transformer", False)}


def first_stage_settings(ddconfig: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of `diffusers`' autoencoder for the shape that a config's `ddconfig` describes."""
    widths = tuple(ddconfig["ch"] * factor for factor in ddconfig["ch_mult"])
    return {"block_out_channels": widths, "layers_per_block": ddconfig["num_res_blocks"],
            "latent_channels": ddconfig["z_channels"], "down_block_types": ("DownEncoderBlock2D",) * len(widths),
            "up_block_types": ("UpDecoderBlock2D",) * len(widths)}


class Parts:
    """`diffusers`' U-Net, first stage and noise schedule and `transformers`' text encoder, of a config's shape.

    Args:
        params: of the config's section `model`.
        text_config: of the text encoder.
        device: where they go.
    """

    def __init__(self, params: Mapping[str, Any], text_config: Any, device: torch.device) -> None:
        need("diffusers")
        from diffusers import DDPMScheduler, UNet2DConditionModel
        from diffusers.utils import logging
        from transformers import CLIPTextModel

        logging.set_verbosity_error()  # it warns of every module that is brought to another precision
        self.device, self.dtype, self.scale = device, precision(device), params.get("scale_factor", 1.0)
        self.unet = filled(UNet2DConditionModel(**unet_settings(params["unet_config"]["params"])))
        self.unet.requires_grad_(False).to(device)
        self.first_stage = _first_stage(params["first_stage_config"]).requires_grad_(False).to(device, self.dtype)
        self.text_config, self.text_class = text_config, CLIPTextModel
        self.schedule = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                                      num_train_timesteps=TRAINING_STEPS)
        self.words = text_config.vocab_size

    def frozen_unet(self) -> nn.Module:
        """The U-Net in the precision of a step; it shares the memory of `unet` where that has the same."""
        with torch.device("meta"):
            copy = type(self.unet).from_config(self.unet.config)
        copy.load_state_dict({name: weight.to(self.dtype) for name, weight in self.unet.state_dict().items()},
                             assign=True)
        return copy.requires_grad_(False)

    def text_encoder(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        return self.text_class(self.text_config).requires_grad_(False).to(self.device, dtype)

    def batch(self, size: int, side: int, length: int) -> dict[str, Tensor]:
        """Pictures (size, 3, side, side) in [-1, 1], and tokens (size, length) with the new word among them."""
        pictures = 2 * torch.rand(size, 3, side, side) - 1
        tokens = torch.randint(1000, (size, length), device=self.device)
        tokens[:, length // 2] = self.words
        tokens[:, -1] = self.text_config.eos_token_id
        return {"pictures": pictures.to(self.device, self.dtype), "tokens": tokens}

    @torch.no_grad()
    def latents(self, pictures: Tensor) -> Tensor:
        """Drawn from what the first stage says of the pictures."""
        found = self.first_stage.encode(pictures)
        return self.scale * getattr(found, "latent_dist", found).sample()

    def loss(self, unet: nn.Module, pictures: Tensor, encoding: Tensor) -> Tensor:
        """The squared error of the noise that the U-Net sees in noisy latents."""
        latents = self.latents(pictures)
        noise = torch.randn_like(latents)
        t = torch.randint(TRAINING_STEPS, (len(latents),), device=self.device)
        predicted = unet(self.schedule.add_noise(latents, noise, t), t, encoding, return_dict=False)[0]
        return nn.functional.mse_loss(predicted.float(), noise.float())


def _first_stage(config: Mapping[str, Any]) -> nn.Module:
    """`diffusers`' autoencoder, or this project's own where `diffusers` has none of the kind."""
    from diffusers import AutoencoderKL

    from ldm.util import instantiate_from_config

    shape = config["params"]["ddconfig"]
    return instantiate_from_config(config) if "patch_size" in shape else AutoencoderKL(**first_stage_settings(shape))


class TextualInversion:
    """The whole table of words is trained, through text encoder and U-Net, and put back but for the new word."""

    def __init__(self, parts: Parts) -> None:
        self.parts, self.unet, self.text = parts, parts.frozen_unet(), parts.text_encoder()
        self.text.resize_token_embeddings(parts.words + 1, mean_resizing=False)
        self.table = self.text.get_input_embeddings().weight.requires_grad_(True)
        self.start = self.table.detach().clone()
        self.old_words = torch.arange(len(self.table), device=parts.device) < parts.words
        self.optimizer = torch.optim.AdamW([self.table], lr=5e-4, weight_decay=1e-2)
        self.holds = [self.unet, self.text, parts.first_stage, self.start, self.optimizer]

    def step(self, batch: Mapping[str, Tensor]) -> None:
        with mixed_precision(self.parts.device):
            encoding = self.text(batch["tokens"])[0].to(self.parts.dtype)
        self.parts.loss(self.unet, batch["pictures"], encoding).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            self.table[self.old_words] = self.start[self.old_words]


class TunedUNet:
    """Weights of the U-Net, or what was added to it, are trained; the text encoder is frozen."""

    def __init__(self, parts: Parts, unet: nn.Module, rate: float) -> None:
        self.parts, self.unet, self.text = parts, unet, parts.text_encoder(parts.dtype)
        self.trained = [parameter for parameter in unet.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=rate, weight_decay=1e-2)
        self.holds = [unet, self.text, parts.first_stage, self.optimizer]

    def step(self, batch: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            encoding = self.text(batch["tokens"] % self.parts.words)[0]
        with mixed_precision(self.parts.device):
            loss = self.parts.loss(self.unet, batch["pictures"], encoding)
        loss.backward()
        nn.utils.clip_grad_norm_(self.trained, LARGEST_GRADIENT)
        self.optimizer.step()
        self.optimizer.zero_grad()


def low_rank(parts: Parts) -> TunedUNet:
    """A LoRA of rank 4 on the attention's projections."""
    need("peft")
    from peft import LoraConfig

    unet = parts.frozen_unet()
    unet.add_adapter(LoraConfig(r=LORA_RANK, lora_alpha=LORA_RANK, init_lora_weights="gaussian",
                                target_modules=list(LORA_LAYERS)))
    for parameter in unet.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(parts.device, torch.float32)
    return TunedUNet(parts, unet, 1e-4)


def full(parts: Parts) -> TunedUNet:
    """Every weight of the U-Net, in 32 bits."""
    return TunedUNet(parts, parts.unet.requires_grad_(True), 1e-5)


METHODS: dict[str, Callable[[Parts], Any]] = {
    "diffusers' Textual Inversion": TextualInversion, "peft's LoRA, rank 4": low_rank, "full fine-tuning": full}
FULL = "full fine-tuning"


def bytes_to_tune(unet: nn.Module) -> int:
    """What full fine-tuning takes beside the weights: a gradient and AdamW's two averages for each."""
    return 3 * sum(parameter.numel() for parameter in unet.parameters()) * torch.float32.itemsize


def built(parts: Parts, free: int | None) -> Iterator[tuple[str, Any]]:
    """Each method by its name, or the UserError that says why it cannot be had; `free` bytes are there."""
    for name, make in METHODS.items():
        try:
            if name == FULL and free is not None and bytes_to_tune(parts.unet) > free / 2:
                raise UserError(f"takes {bytes_to_tune(parts.unet) / 1e9:.0f} GB beside its weights, more than half of "
                                f"the {free / 1e9:.0f} GB that are free")
            yield name, make(parts)
        except UserError as error:
            yield name, error
