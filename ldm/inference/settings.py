"""The settings and options of generation, as plain values. Imports no torch."""
from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from ldm.common.errors import UserError
from ldm.common.paths import expand_home, resolve_path

AUTO = "auto"  # a bias that `ldm.inference.auto_bias` chooses

Number = TypeVar("Number", bound=float | str | None)


@dataclass(frozen=True)
class GenerationSettings:
    """The settings of generation. None leaves a setting to the model's config, the sampler or the concept.

    Attributes:
        num_inference_steps: 1 up to the model's timesteps.
        guidance_scale: 1 is no guidance; higher follows the prompt more closely.
        sampler: a name in `ldm.sampling.samplers.SAMPLERS`.
        eta: 0..1, share of DDPM's noise that each step adds.
        height, width: size of the images in pixels.
        bias, temperature: beta and tau, one value for all concepts or a tuple with one for each. A bias may be "auto".
        global_locking: lock the keys of the whole prompt to the super-category, not only those of the concept's word.
        all_layers: use the learned target outputs of all layers, whatever the concepts' `used_layers` are.
        prompt_weights: whether "(word:1.3)", "((word))" and "[word]" in prompts weight words
            (`ldm.concepts.prompt_weights`); False: they are ordinary text.
        original_size, crop, target_size: (height, width), (top, left) and (height, width) in pixels that models which
            read sizes are conditioned on; None: the size of the images, and (0, 0).
        timestep_spacing: a name in `ldm.sampling.spacings.TIMESTEP_SPACINGS`.
        guidance_rescale: 0..1, share of the standard deviation that guidance adds to an output to take back.
    """

    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    sampler: str | None = None
    eta: float | None = None
    height: int | None = None
    width: int | None = None
    bias: float | str | tuple[float | str | None, ...] | None = None
    temperature: float | tuple[float | None, ...] | None = None
    global_locking: bool = False
    all_layers: bool = False
    prompt_weights: bool = True
    original_size: tuple[int, int] | None = None
    crop: tuple[int, int] | None = None
    target_size: tuple[int, int] | None = None
    timestep_spacing: str | None = None
    guidance_rescale: float | None = None

    @property
    def size_conditions(self) -> dict[str, tuple[int, int]]:
        """The sizes that were given."""
        given = {"original_size": self.original_size, "crop": self.crop, "target_size": self.target_size}
        return {name: value for name, value in given.items() if value is not None}

    @property
    def biases(self) -> tuple[float | str | None, ...] | None:
        """The biases as a tuple; None if concepts keep their own."""
        return as_tuple(self.bias)

    def biases_of(self, count: int) -> tuple[float | str | None, ...]:
        """Return the bias of each of `count` concepts, if biases are set."""
        return self.biases if len(self.biases) > 1 else self.biases * count

    @property
    def temperatures(self) -> tuple[float | None, ...] | None:
        """The temperatures as a tuple; None if concepts keep their own."""
        return as_tuple(self.temperature)

    def without_concept_settings(self) -> GenerationSettings:
        """Return a copy that leaves concepts as they are: their bias, temperature and layers."""
        return replace(self, bias=None, temperature=None, all_layers=False)


@dataclass(frozen=True)
class LoraFile:
    """A LoRA to add to the base model's weights.

    Attributes:
        path: its file, or a folder of PEFT or diffusers.
        scale: how much of it to add; 1 is as it was trained, below 0 is its opposite.
    """

    path: str
    scale: float = 1.0

    @classmethod
    def parse(cls, text: str | Path | LoraFile) -> LoraFile:
        """Return the LoRA that "FILE" or "FILE:SCALE" names.

        A colon in the name of a file or after the letter of a drive, as in `C:\\loras\\style.safetensors`, is no
        scale.

        Raises:
            UserError: the scale is not finite, or no file can have that name.
        """
        if isinstance(text, LoraFile):
            return text
        whole = os.fspath(text)
        name, colon, scale = whole.rpartition(":")
        is_drive = len(name) == 1 and name.isalpha()
        if not colon or not name or is_drive or resolve_path(whole).exists():
            return cls(expand_home(whole))
        try:
            number = float(scale)
        except ValueError:
            return cls(expand_home(whole))
        if not math.isfinite(number):
            raise UserError(f"--lora {whole}: the scale must be a finite number, such as 0.8")
        return cls(expand_home(name), number)


@dataclass(frozen=True)
class ModelSettings:
    """The base model, and how to load it.

    Attributes:
        config: YAML file that describes the model.
        checkpoint: .ckpt, .safetensors or diffusers folder; None: the one that the config names.
        device: such as "cuda:1"; None: the fastest there is.
        precision: "full", "autocast" (sample in 16 bits), or None: autocast on CUDA, full elsewhere.
        vae, text_encoder: file or folder to take the first stage or the text encoder from instead.
        loras: added to the weights in this order.
    """

    config: str
    checkpoint: str | None = None
    device: str | None = None
    precision: str | None = None
    vae: str | None = None
    text_encoder: str | None = None
    loras: tuple[LoraFile, ...] = ()


@dataclass(frozen=True)
class SourceSettings:
    """An image to start from, and the part of it to regenerate.

    Attributes:
        image: its file.
        strength: above 0 and up to 1, how far to go from it; 1 ignores it.
        mask: image file, white where the image is regenerated.
        mask_prompt: words that a segmenter finds that part by.
        segmenter: folder or hub name of that CLIPSeg; None: the model's.
        grow: pixels by which the mask is spread first.
        border: width in pixels of the blend around the mask; None: a share of the shorter side.
    """

    image: str
    strength: float
    mask: str | None = None
    mask_prompt: str | None = None
    segmenter: str | None = None
    grow: int = 0
    border: int | None = None

    @property
    def inpaints(self) -> bool:
        """Whether only a part of the image is regenerated."""
        return self.mask is not None or self.mask_prompt is not None


@dataclass(frozen=True)
class PhotoSettings:
    """Photos to predict a concept from, without training.

    Attributes:
        folder: the photos.
        super_category: what kind of subject they show.
        placeholder: its word in prompts.
        encoder: folder of the encoder; None: the model's.
        strength: how strong the look is; None: the encoder's own.
        masks: folder of masks; None: the subject is segmented.
    """

    folder: str
    super_category: str
    placeholder: str = "<it>"
    encoder: str | None = None
    strength: float | None = None
    masks: str | None = None


@dataclass(frozen=True)
class GenerationOptions:
    """Everything that a command line asks of a script that generates.

    Attributes:
        prompts: one or more.
        negative_prompts: none, one for all prompts, or one for each.
        model: the base model.
        outdir: folder to write to.
        concepts: concept files.
        settings: how to generate.
        seed: seed of the first image of each prompt; each further image adds 1.
        num_images: images of each prompt.
        columns: images in a row of a contact sheet.
        batch_size: images generated at a time.
        source: an image to start from.
        clip: what `bias="auto"` measures by: folder or name of a CLIP; None: the model's.
        photos: folder of the concept's photos, for `bias="auto"`.
        subject: photos to predict one more concept from.
    """

    prompts: tuple[str, ...]
    model: ModelSettings
    outdir: str
    negative_prompts: tuple[str, ...] = ()
    concepts: tuple[str, ...] = ()
    settings: GenerationSettings = GenerationSettings()
    seed: int = 1
    num_images: int = 4
    columns: int = 4
    batch_size: int = 4
    source: SourceSettings | None = None
    clip: str | None = None
    photos: str | None = None
    subject: PhotoSettings | None = None


def as_tuple(value: Number | Sequence[Number] | None) -> tuple[Number, ...] | None:
    """Return one value as a tuple of one, several as a tuple, and None as None."""
    if value is None or isinstance(value, tuple):
        return value
    return tuple(value) if isinstance(value, list) else (value,)
