"""Training steps of other methods, built from `diffusers` and `peft` as in the example scripts of `diffusers`.

Source: huggingface/diffusers, examples/textual_inversion/textual_inversion.py, examples/text_to_image/
train_text_to_image_lora.py and train_text_to_image.py, on CUDA with `--mixed_precision bf16`, which keeps frozen
networks in 16 bits. As in those scripts, every step encodes the images by the first stage, the optimizer is AdamW, and
gradients are clipped at 1 where the scripts do so.
"""
from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ldm.common.errors import UserError
from scripts.benchmarks.device import compute_dtype, mixed_precision
from scripts.benchmarks.random_models import fill_zero_parameters

TIMESTEPS = 1000
SIZE_FEATURES, SIZE_COUNT = 256, 6  # features of each of the numbers that SDXL is told of an image's size
LORA_RANK = 4
MAX_GRADIENT_NORM = 1.0
LORA_LAYERS = ("to_q", "to_k", "to_v", "to_out.0")


def require_packages(*packages: str) -> None:
    """Raise UserError if a package is not installed."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise UserError(f"{package} is not installed: pip install -e \".[benchmark]\"")


def unet_settings(params: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of `diffusers`' U-Net for the shape of a config's `unet_config.params`."""
    widths = [params["model_channels"] * factor for factor in params["channel_mult"]]
    attends = [2**level in params["attention_resolutions"] for level in range(len(widths))]
    if "num_heads" in params:
        heads = [params["num_heads"]] * len(widths)
    else:
        heads = [width // params["num_head_channels"] for width in widths]
    vector = {}
    if params.get("num_classes") == "sequential":  # Stable Diffusion XL
        vector = {"addition_embed_type": "text_time", "addition_time_embed_dim": SIZE_FEATURES,
                  "projection_class_embeddings_input_dim": params["adm_in_channels"]}
    depth = params["transformer_depth"]
    return {
        **vector,
        "transformer_layers_per_block": depth if isinstance(depth, int) else tuple(depth),
        "in_channels": params["in_channels"],
        "out_channels": params["out_channels"],
        "block_out_channels": tuple(widths),
        "layers_per_block": params["num_res_blocks"],
        "attention_head_dim": tuple(heads),
        "cross_attention_dim": params["context_dim"],
        "down_block_types": tuple("CrossAttnDownBlock2D" if attend else "DownBlock2D" for attend in attends),
        "up_block_types": tuple("CrossAttnUpBlock2D" if attend else "UpBlock2D" for attend in reversed(attends)),
        "use_linear_projection": params.get("use_linear_in_transformer", False),
    }


def first_stage_settings(ddconfig: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of `diffusers`' autoencoder for the shape of a config's `ddconfig`."""
    widths = tuple(ddconfig["ch"] * factor for factor in ddconfig["ch_mult"])
    return {
        "block_out_channels": widths,
        "layers_per_block": ddconfig["num_res_blocks"],
        "latent_channels": ddconfig["z_channels"],
        "down_block_types": ("DownEncoderBlock2D",) * len(widths),
        "up_block_types": ("UpDecoderBlock2D",) * len(widths),
    }


class DiffusersComponents:
    """`diffusers`' U-Net, first stage and noise schedule, and `transformers`' text encoder, of a config's shape.

    Args:
        params: params of the config's section `model`.
        text_config: config of the text encoder.
        device: device of the components.

    Raises:
        UserError: if `diffusers` is not installed.
    """

    def __init__(self, params: Mapping[str, Any], text_config: Any, device: torch.device) -> None:
        require_packages("diffusers")
        from diffusers import DDPMScheduler, UNet2DConditionModel
        from diffusers.utils import logging
        from transformers import CLIPTextModel

        logging.set_verbosity_error()  # it warns of every module that is converted to another dtype
        self.device, self.dtype, self.scale = device, compute_dtype(device), params.get("scale_factor", 1.0)
        self.unet = fill_zero_parameters(UNet2DConditionModel(**unet_settings(params["unet_config"]["params"])))
        self.unet.requires_grad_(False).to(device)
        self.first_stage = _first_stage(params["first_stage_config"]).requires_grad_(False).to(device, self.dtype)
        self.text_config, self.text_class = text_config, CLIPTextModel
        self.schedule = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                                      num_train_timesteps=TIMESTEPS)
        self.vocab_size = text_config.vocab_size

    def frozen_unet(self) -> nn.Module:
        """Return a U-Net in the dtype of a step; if that is the dtype of `unet`, both share their memory."""
        with torch.device("meta"):
            copy = type(self.unet).from_config(self.unet.config)
        copy.load_state_dict({name: weight.to(self.dtype) for name, weight in self.unet.state_dict().items()},
                             assign=True)
        return copy.requires_grad_(False)

    def text_encoder(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """Return a new frozen text encoder."""
        return self.text_class(self.text_config).requires_grad_(False).to(self.device, dtype)

    def batch(self, size: int, side: int, length: int) -> dict[str, Tensor]:
        """Return random images (size, 3, side, side) in [-1, 1] and tokens (size, length) with a new word in them."""
        images = 2 * torch.rand(size, 3, side, side) - 1
        tokens = torch.randint(1000, (size, length), device=self.device)
        tokens[:, length // 2] = self.vocab_size
        tokens[:, -1] = self.text_config.eos_token_id
        return {"images": images.to(self.device, self.dtype), "tokens": tokens}

    @torch.no_grad()
    def latents(self, images: Tensor) -> Tensor:
        """Encode images and sample their latents."""
        encoded = self.first_stage.encode(images)
        return self.scale * getattr(encoded, "latent_dist", encoded).sample()

    def loss(self, unet: nn.Module, images: Tensor, encoding: Tensor) -> Tensor:
        """Compute the squared error of the noise that the U-Net predicts."""
        latents = self.latents(images)
        noise = torch.randn_like(latents)
        t = torch.randint(TIMESTEPS, (len(latents),), device=self.device)
        predicted = unet(self.schedule.add_noise(latents, noise, t), t, encoding, return_dict=False)[0]
        return nn.functional.mse_loss(predicted.float(), noise.float())


def _first_stage(config: Mapping[str, Any]) -> nn.Module:
    """Return `diffusers`' autoencoder, or this project's own if `diffusers` has none of the kind."""
    from diffusers import AutoencoderKL

    from ldm.util import instantiate_from_config

    shape = config["params"]["ddconfig"]
    return instantiate_from_config(config) if "patch_size" in shape else AutoencoderKL(**first_stage_settings(shape))


class DiffusersTextualInversion:
    """Textual Inversion: train the whole word table through text encoder and U-Net, then reset all old words."""

    def __init__(self, components: DiffusersComponents) -> None:
        self.components, self.unet = components, components.frozen_unet()
        self.text_encoder = components.text_encoder()
        self.text_encoder.resize_token_embeddings(components.vocab_size + 1, mean_resizing=False)
        self.table = self.text_encoder.get_input_embeddings().weight.requires_grad_(True)
        self.initial_table = self.table.detach().clone()
        self.is_old = torch.arange(len(self.table), device=components.device) < components.vocab_size
        self.optimizer = torch.optim.AdamW([self.table], lr=5e-4, weight_decay=1e-2)
        self.memory_holders = [self.unet, self.text_encoder, components.first_stage, self.initial_table, self.optimizer]

    def step(self, batch: Mapping[str, Tensor]) -> None:
        with mixed_precision(self.components.device):
            encoding = self.text_encoder(batch["tokens"])[0].to(self.components.dtype)
        self.components.loss(self.unet, batch["images"], encoding).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            self.table[self.is_old] = self.initial_table[self.is_old]


class FinetunedUNet:
    """Fine-tuning: train the weights of the U-Net that require a gradient. The text encoder is frozen."""

    def __init__(self, components: DiffusersComponents, unet: nn.Module, learning_rate: float) -> None:
        self.components, self.unet = components, unet
        self.text_encoder = components.text_encoder(components.dtype)
        self.trained = [parameter for parameter in unet.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=learning_rate, weight_decay=1e-2)
        self.memory_holders = [unet, self.text_encoder, components.first_stage, self.optimizer]

    def step(self, batch: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            encoding = self.text_encoder(batch["tokens"] % self.components.vocab_size)[0]
        with mixed_precision(self.components.device):
            loss = self.components.loss(self.unet, batch["images"], encoding)
        loss.backward()
        nn.utils.clip_grad_norm_(self.trained, MAX_GRADIENT_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()


def lora(components: DiffusersComponents) -> FinetunedUNet:
    """Return the training of a LoRA of rank 4 on the projections of the attention layers."""
    require_packages("peft")
    from peft import LoraConfig

    unet = components.frozen_unet()
    unet.add_adapter(LoraConfig(r=LORA_RANK, lora_alpha=LORA_RANK, init_lora_weights="gaussian",
                                target_modules=list(LORA_LAYERS)))
    for parameter in unet.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(components.device, torch.float32)
    return FinetunedUNet(components, unet, 1e-4)


def full_finetuning(components: DiffusersComponents) -> FinetunedUNet:
    """Return the training of every weight of the U-Net, in 32 bits."""
    return FinetunedUNet(components, components.unet.requires_grad_(True), 1e-5)


FULL = "full fine-tuning"
METHODS: dict[str, Callable[[DiffusersComponents], Any]] = {
    "diffusers' Textual Inversion": DiffusersTextualInversion, "peft's LoRA, rank 4": lora, FULL: full_finetuning}


def full_finetuning_memory(unet: nn.Module) -> int:
    """Return the bytes that full fine-tuning takes besides the weights: gradients and AdamW's two averages."""
    return 3 * sum(parameter.numel() for parameter in unet.parameters()) * torch.float32.itemsize


def build_methods(components: DiffusersComponents, free: int | None) -> Iterator[tuple[str, Any]]:
    """Yield the name of each method with the method, or with the UserError that says why it is left out.

    Args:
        components: what the methods are built from.
        free: free memory in bytes; None: unknown.
    """
    for name, build in METHODS.items():
        try:
            needed = full_finetuning_memory(components.unet)
            if name == FULL and free is not None and needed > free / 2:
                raise UserError(f"takes {needed / 1e9:.0f} GB besides its weights, more than half of the "
                                f"{free / 1e9:.0f} GB that are free")
            yield name, build(components)
        except UserError as error:
            yield name, error
