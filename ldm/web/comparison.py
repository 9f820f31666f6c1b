"""Where images look at a word of their prompt, and how similar they are to the prompt and to the subject's photos."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldm.common.errors import UserError
from ldm.common.words import fold_word
from ldm.concepts.prompt_weights import parse_prompt
from ldm.concepts.word_positions import word_positions
from ldm.data.images import crop_square, load_folder, read_image, to_tensor
from ldm.inference.auto_bias import clip_for
from ldm.inference.output_folder import read_metadata
from ldm.inference.requests import GenerationRequest
from ldm.inference.settings import GenerationSettings
from ldm.models.clip_encoder import ClipEncoder
from ldm.modules.attention_maps import AttentionMaps, record_attention
from ldm.web.concept_files import ConceptFiles
from ldm.web.site import Site

STEP_GROUPS = ("early steps", "middle steps", "late steps")
MAP_COLOR = np.array([255.0, 48.0, 128.0])


@dataclass(frozen=True)
class ImageSimilarity:
    """How similar an image is to its prompt and to photos, as cosines of CLIP embeddings.

    Attributes:
        name: of the image's file.
        text: to the prompt, with the kind of subject in place of the concept's word; None if the prompt is not known.
        photos: to the photos, their mean; None without photos.
    """

    name: str
    text: float | None
    photos: float | None


class Comparison:
    """Compares with the site's pipeline and the CLIP of its model.

    Args:
        site: what all tabs share.
        concepts: the concept files to choose from.
    """

    def __init__(self, site: Site, concepts: ConceptFiles) -> None:
        self.site, self.concepts = site, concepts
        self._clip: ClipEncoder | None = None

    def attention(self, prompt: str, word: str, files: Sequence[str], seed: int, settings: GenerationSettings
                  ) -> list[tuple[Image.Image, str]]:
        """Generate an image, and return it and where it attended to a word early, midway and late, with titles.

        Raises:
            UserError: the word does not occur in the prompt, or something cannot be used.
        """
        if not word.strip():
            raise UserError("which word? Give one of the prompt's, or a concept's")
        loaded = self.concepts.read(files)
        with self.site.pipeline() as shared:
            # The accelerated U-Net of a pipeline that has generated on a GPU has no layers that could be recorded.
            pipeline = shared if shared.accelerate else self.site.load_pipeline()
            pipeline.unload_concepts()
            pipeline.load_concepts(*loaded)
            settings = pipeline.complete(settings)
            if settings.num_inference_steps < len(STEP_GROUPS):
                raise UserError(f"{settings.num_inference_steps} steps: give {len(STEP_GROUPS)} or more")
            encoder = pipeline.prompt_encoder(pipeline.concepts)
            tokens = word_positions(encoder, parse_prompt(prompt, encoder.placeholders), word.strip())
            unet = pipeline.model.model.diffusion_model
            pipeline.accelerate = False
            try:
                with record_attention(unet, tokens[None], pipeline.latent_size(settings)) as maps:
                    image = next(iter(pipeline.generate([GenerationRequest(prompt, seed)], settings)))
            finally:
                pipeline.accelerate = True
        shown = [(image, f"seed {seed}")]
        for index, title in enumerate(STEP_GROUPS):
            shown.append((overlay(image, mean_map(maps, index)), title))
        return shown

    def similarities(self, paths: Sequence[str], photos: Path | None, kinds: dict[str, str]) -> list[ImageSimilarity]:
        """Return the similarities of generated images.

        Args:
            paths: files of the images.
            photos: folder of the subject's photos, or None.
            kinds: placeholder -> kind of subject.

        Raises:
            UserError: there is no CLIP for this model, or a file cannot be read.
        """
        clip = self._load_clip()
        references = None if photos is None else embed(clip, [photo for _, photo in load_folder(photos)])
        found = []
        for path in paths:
            image = embed(clip, [read_image(path)])
            prompt = read_metadata(path).get("prompt")
            text = None
            if isinstance(prompt, str):
                plain = " ".join(kinds.get(fold_word(word), word) for word in prompt.split())
                text = float((image @ clip.embed_texts([plain]).T).mean())
            similar = None if references is None else float((image @ references.T).mean())
            found.append(ImageSimilarity(Path(path).name, text, similar))
        return found

    def _load_clip(self) -> ClipEncoder:
        if self._clip is None:
            from ldm.inference.model_config import inference_defaults, model_setting

            config = self.site.model_config
            checkpoint = self.site.settings.model.checkpoint or model_setting(config, "params.ckpt_path")
            name = clip_for(None, inference_defaults(config, checkpoint), checkpoint)
            self._clip = ClipEncoder.from_path(name, self.site.device)
        return self._clip


def embed(clip: ClipEncoder, images: Sequence[Image.Image]) -> Tensor:
    """Return the embeddings (n, d) of images."""
    pixels = [to_tensor(crop_square(image, clip.image_size)) for image in images]
    return clip.embed_images(torch.stack(pixels).to(clip.device))


def mean_map(maps: AttentionMaps, group: int) -> np.ndarray:
    """Return the mean over layers of one group of steps, (H, W) in [0, 1], at the size of the largest layer."""
    grouped = [values[0, group].numpy() for values in maps.grouped(len(STEP_GROUPS)).values()]
    size = max(values.shape for values in grouped)
    resized = [Image.fromarray(values / max(values.max(), 1e-9)).resize(size[::-1], Image.Resampling.BILINEAR)
               for values in grouped]
    mean = np.mean([np.asarray(values) for values in resized], axis=0)
    return mean / max(float(mean.max()), 1e-9)


def overlay(image: Image.Image, weights: np.ndarray) -> Image.Image:
    """Return an image that is colored where the weights (h, w) in [0, 1] are high, and darker elsewhere."""
    resized = np.asarray(Image.fromarray(weights.astype(np.float32)).resize(image.size, Image.Resampling.BILINEAR))
    share = np.clip(resized, 0, 1)[..., None]
    pixels = np.asarray(image.convert("RGB"), np.float32)
    colored = pixels * (0.35 + 0.65 * share) * (1 - 0.45 * share) + 0.45 * share * MAP_COLOR
    return Image.fromarray(np.clip(colored, 0, 255).astype(np.uint8))
