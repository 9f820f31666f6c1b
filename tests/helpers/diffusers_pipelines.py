"""Small models as pipelines of diffusers with the same weights, their concepts, and images of our own sampler."""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from torch import Generator, Tensor, nn
from transformers import CLIPTokenizer

from helpers.oracles import diffusers_unet_state
from helpers.oracles_vae import diffusers_vae_state
from ldm.concepts.concept import Concept
from ldm.concepts.fingerprint import BaseModel
from ldm.inference.pipeline import PerfusionPipeline
from ldm.inference.requests import GenerationRequest
from ldm.inference.settings import GenerationSettings
from ldm.inference.size_conditions import sizes_of, with_sizes
from ldm.modules.attention import name_text_layers
from ldm.modules.context import PromptContext
from ldm.modules.encoders.clip import TOKENIZER
from ldm.modules.rank_one import dual_vectors, invert_covariance

DDIM = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
        "steps_offset": 1, "timestep_spacing": "leading", "set_alpha_to_one": False, "clip_sample": False}
UNET = {"sample_size": 8, "in_channels": 4, "out_channels": 4, "layers_per_block": 1, "block_out_channels": (32, 64),
        "down_block_types": ("CrossAttnDownBlock2D",) * 2, "up_block_types": ("CrossAttnUpBlock2D",) * 2,
        "attention_head_dim": 2, "use_linear_projection": False}
VAE = {"sample_size": 16, "in_channels": 3, "out_channels": 3, "latent_channels": 4, "block_out_channels": (32, 32),
       "layers_per_block": 1, "scaling_factor": 0.18215, "down_block_types": ("DownEncoderBlock2D",) * 2,
       "up_block_types": ("UpDecoderBlock2D",) * 2}
STEPS = 2


def stable_diffusion(model: Any) -> StableDiffusionPipeline:
    """Return the pipeline of a model of `helpers.tiny_models`, with DDIM."""
    encoder = model.cond_stage_model
    unet = UNet2DConditionModel(**UNET, cross_attention_dim=encoder.transformer.config.hidden_size)
    unet.load_state_dict(diffusers_unet_state(model.model.diffusion_model.state_dict(), 1))
    vae = AutoencoderKL(**VAE)
    vae.load_state_dict(diffusers_vae_state(model.first_stage_model.state_dict(), 2))
    text_encoder = type(encoder.transformer)(encoder.transformer.config)
    text_encoder.load_state_dict(encoder.transformer.state_dict())
    pipe = StableDiffusionPipeline(
        vae=vae, text_encoder=text_encoder, unet=unet, scheduler=DDIMScheduler(**DDIM),
        tokenizer=CLIPTokenizer.from_pretrained(TOKENIZER, model_max_length=encoder.max_length),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    for module in (vae, text_encoder, unet):
        module.eval().requires_grad_(False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def make_concept(model: Any, placeholder: str, super_category: str, seed: int, **settings: Any) -> Concept:
    """Return a random concept of a model, whose gate opens at its word."""
    encoder, layers = model.cond_stage_model, name_text_layers(model.model.diffusion_model)
    generator = Generator().manual_seed(seed)

    def encoding_of(vector: Tensor) -> Tensor:
        """Return what the text encoder makes of the word in "a photo of a <word>"."""
        tokens = encoder.tokenize([f"a photo of a {placeholder}"], [placeholder])
        return encoder.encode_tokens(tokens, vector)[0, 5]

    embedding = 0.3 * torch.randn(1, encoder.embedding_width, generator=generator)
    words = encoder.encode_tokens(encoder.tokenize(["a red dog and a box", "one cup on the big table"])).flatten(0, 1)
    target_input = encoding_of(embedding)
    inverse = invert_covariance(words.mT @ words / len(words), ridge=0.1)
    return Concept(
        placeholder=placeholder,
        super_category=super_category,
        embedding=embedding,
        target_input=target_input,
        super_input=encoding_of(torch.randn(embedding.shape, generator=generator)),
        target_outputs_v={name: torch.randn(len(layer.to_v.weight), generator=generator)
                          for name, layer in layers.items()},
        dual=dual_vectors(target_input[None], inverse)[0].cpu(),
        **BaseModel.of(layers).stored,
        **{"bias": 0.5, "temperature": 0.2, **settings})


def noise(seeds: Sequence[int]) -> Tensor:
    """Return the starting noise of images with these seeds, as our samplers draw it."""
    return torch.cat([torch.randn(1, 4, 8, 8, generator=Generator().manual_seed(seed)) for seed in seeds])


class OwnSampler:
    """Images by this project, of a model and its concepts.

    Args:
        model: a `LatentDiffusion`.
        config: its config; needed for SDXL.
    """

    def __init__(self, model: Any, concepts: Sequence[Concept], config: Any = None) -> None:
        self.pipeline, self.concepts = PerfusionPipeline(model, config), list(concepts)
        size = {} if config is None else {"height": 16, "width": 16}
        self.settings = self.pipeline.complete(GenerationSettings(STEPS, 3.0, "ddim", 0.0, **size))

    def images(self, requests: Sequence[GenerationRequest], global_locking: bool = False, start: Any = None,
               **settings: Any) -> Tensor:
        """Return (B, 3, H, W) in 0..1."""
        latents = self.pipeline.latents(self._encoded(requests, global_locking), requests,
                                        replace(self.settings, **settings), start)
        with torch.no_grad():
            return (self.pipeline.model.decode_first_stage(latents) / 2 + 0.5).clamp(0, 1)

    def contexts(self, requests: Sequence[GenerationRequest], global_locking: bool = False
                 ) -> tuple[PromptContext, PromptContext]:
        """Return the prompts and the negative prompts."""
        contexts = self._encoded(requests, global_locking).for_requests(requests)
        if self.pipeline.config is None:
            return contexts
        sizes = sizes_of(self.settings, (16, 16))
        return tuple(with_sizes(self.pipeline.model, context, sizes) for context in contexts)

    def _encoded(self, requests: Sequence[GenerationRequest], global_locking: bool) -> Any:
        texts = [text for request in requests for text in (request.prompt, request.negative_prompt)]
        return self.pipeline.encode(texts, self.concepts, global_locking, prompt_weights=False)


@dataclass
class Family:
    """A base model in both libraries.

    Attributes:
        own: our sampler, with both concepts.
        pipe: text to image of diffusers, without concepts.
        concepts: <teddy> and <pot>.
    """

    own: OwnSampler
    pipe: DiffusionPipeline
    concepts: list[Concept]

    def images(self, prompt: Any, *, seeds: tuple[int, ...] = (0,), pipe: Any = None, **settings: Any) -> Tensor:
        """Return images (B, 3, H, W) of diffusers, in 0..1."""
        pipe = pipe or self.pipe
        defaults = {"num_inference_steps": STEPS, "guidance_scale": 3.0, "output_type": "pt", "height": 16, "width": 16,
                    "latents": noise(seeds).to(pipe.vae.dtype)}
        return pipe(prompt, **{**defaults, **settings}).images


def requests_of(*pairs: tuple[str, str], seeds: tuple[int, ...] = (0,)) -> list[GenerationRequest]:
    """Return requests for (prompt, negative prompt), each with all of its seeds in turn."""
    each = len(seeds) // len(pairs)
    return [GenerationRequest(prompt, seeds[index * each + number], negative)
            for index, (prompt, negative) in enumerate(pairs) for number in range(each)]


@contextmanager
def own_unet(pipe: Any, own: OwnSampler, requests: Sequence[GenerationRequest], global_locking: bool = False
             ) -> Iterator[dict[str, Tensor]]:
    """Let a pipeline of diffusers call our U-Net with our prompts, whatever embeddings it passes.

    Yields:
        The embeddings to pass to the pipeline, which only a ControlNet reads.
    """
    prompts, negatives = own.contexts(requests, global_locking)
    model = own.pipeline.model
    unet = model.model.diffusion_model

    def forward(sample: Tensor, t: Tensor, **kwargs: Any) -> tuple[Tensor]:
        context = PromptContext.cat([negatives, prompts]) if len(sample) > len(requests) else prompts
        with residuals_added(unet, kwargs.get("down_block_additional_residuals"),
                             kwargs.get("mid_block_additional_residual")):
            return (model.apply_model(sample, t.expand(len(sample)), context),)

    pipe.unet.forward = forward
    embeds = {"prompt_embeds": prompts.encoding, "negative_prompt_embeds": negatives.encoding}
    if prompts.pooled is not None:
        embeds |= {"pooled_prompt_embeds": prompts.pooled, "negative_pooled_prompt_embeds": negatives.pooled}
    try:
        yield embeds
    finally:
        del pipe.unet.forward


@contextmanager
def residuals_added(unet: nn.Module, down: Sequence[Tensor] | None, middle: Tensor | None) -> Iterator[None]:
    """Add a ControlNet's residuals to the skip connections and to the middle block of our U-Net."""
    def add_to_skip(residual: Tensor) -> Any:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            below, skip = inputs[0].split([inputs[0].shape[1] - residual.shape[1], residual.shape[1]], 1)
            return torch.cat([below, skip + residual], 1), *inputs[1:]
        return hook

    with ExitStack() as hooks:
        for block, residual in zip(unet.output_blocks, reversed(down or ()), strict=False):
            hooks.callback(block.register_forward_pre_hook(add_to_skip(residual)).remove)
        if middle is not None:
            hooks.callback(unet.middle_block.register_forward_hook(lambda *call: call[-1] + middle).remove)
        yield
