"""CLIP similarities with the interface of Textual Inversion's public code (Gal et al., ICLR 2023, Sec. 4).

Its scores differ a little from those of `similarity`: prompts lose their placeholder "*" instead of naming the kind of
subject, and a score is the mean over all pairs of images, or over all images and texts.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import open_clip
import torch
from torch import Tensor
from torchvision import transforms

from ldm.common.paths import resolve_path
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.open_clip_folder import load_openclip
from ldm.modules.encoders.clip_features import load_clip, tokenize_texts

BATCH_SIZE = 8
LATENT_SHAPE = (4, 32, 32)  # of LDM's text-to-image model, which generates 256 pixels
GUIDANCE_SCALE = 5.0


class CLIPEvaluator:
    """Embed images and texts by a CLIP, and compare them.

    Args:
        device: where the CLIP runs.
        clip_model: one of OpenAI's, such as "ViT-B/32"; ARCHITECTURE/WEIGHTS of `open_clip`; or a folder in its layout.

    Attributes:
        model: the CLIP.
        preprocess: turns images (B, 3, H, W) in [-1, 1] into those that the CLIP takes.
    """

    def __init__(self, device: torch.device | str, clip_model: str = "ViT-B/32") -> None:
        folder = resolve_path(clip_model)
        self.device = device
        self.model = (load_openclip(folder) if folder.is_dir() else load_clip(clip_model)).to(device).eval()
        size = self.model.visual.image_size
        self.preprocess = transforms.Compose([
            transforms.Normalize([-1.0] * 3, [2.0] * 3),  # from [-1, 1] to [0, 1]
            transforms.Resize(size if isinstance(size, int) else size[0], transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(size),
            transforms.Normalize(open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD),
        ])

    def tokenize(self, strings: Sequence[str] | str) -> Tensor:
        """Return the tokens (B, N) of texts. Long texts are cut off, with a warning."""
        texts = [strings] if isinstance(strings, str) else list(strings)
        return tokenize_texts(texts, self.model.context_length).to(self.device)

    @torch.no_grad()
    def encode_text(self, tokens: Tensor) -> Tensor:
        """Return the features (B, d) of tokens."""
        return self.model.encode_text(tokens)

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """Return the features (B, d) of images (B, 3, H, W) in [-1, 1]."""
        return self.model.encode_image(self.preprocess(images).to(self.device))

    def get_text_features(self, text: Sequence[str] | str, norm: bool = True) -> Tensor:
        """Return the features of texts, of length 1 if `norm` is set."""
        features = self.encode_text(self.tokenize(text))
        return torch.nn.functional.normalize(features, dim=-1) if norm else features

    def get_image_features(self, img: Tensor, norm: bool = True) -> Tensor:
        """Return the features of images, of length 1 if `norm` is set."""
        features = self.encode_images(img)
        return torch.nn.functional.normalize(features, dim=-1) if norm else features

    def img_to_img_similarity(self, src_images: Tensor, generated_images: Tensor) -> Tensor:
        """Return the mean cosine of all pairs of a source image and a generated one."""
        return (self.get_image_features(src_images) @ self.get_image_features(generated_images).T).mean()

    def txt_to_img_similarity(self, text: Sequence[str] | str, generated_images: Tensor) -> Tensor:
        """Return the mean cosine of texts and generated images."""
        return (self.get_text_features(text) @ self.get_image_features(generated_images).T).mean()


class ImageDirEvaluator(CLIPEvaluator):
    """Compare given images with source images and with a prompt."""

    def evaluate(self, gen_samples: Tensor, src_images: Tensor, target_text: str) -> tuple[Tensor, Tensor]:
        """Return the similarity to the source images, and to the prompt without its placeholder "*"."""
        return (self.img_to_img_similarity(src_images, gen_samples),
                self.txt_to_img_similarity(target_text.replace("*", ""), gen_samples))


class LDMCLIPEvaluator(CLIPEvaluator):
    """Compare images that a latent diffusion model generates with source images and with their prompt."""

    @torch.no_grad()
    def evaluate(self, ldm_model: Any, src_images: Tensor, target_text: str, n_samples: int = 64, n_steps: int = 50
                 ) -> tuple[Tensor, Tensor]:
        """Generate images in batches of 8 by DDIM, and compare them as `ImageDirEvaluator` does."""
        sampler, batches = DDIMSampler(ldm_model), []
        with ldm_model.ema_scope():
            unconditional = ldm_model.get_learned_conditioning(BATCH_SIZE * [""])
            for _ in range(n_samples // BATCH_SIZE):
                latents, _ = sampler.sample(
                    S=n_steps, conditioning=ldm_model.get_learned_conditioning(BATCH_SIZE * [target_text]),
                    batch_size=BATCH_SIZE, shape=LATENT_SHAPE, verbose=False, eta=0.0,
                    unconditional_guidance_scale=GUIDANCE_SCALE, unconditional_conditioning=unconditional)
                batches.append(ldm_model.decode_first_stage(latents).clamp(-1, 1))
        images = torch.cat(batches)
        return (self.img_to_img_similarity(src_images, images),
                self.txt_to_img_similarity(target_text.replace("*", ""), images))
