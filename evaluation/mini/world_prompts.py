"""Prompts for the base model, and how kinds of subjects and backgrounds are recognized in its images.

Prompts are captions of `SceneDataset` for scenes of plain subjects in their own colors. Such captions combine few
words, so training has seen most of them. The images are held out by their seeds. The reference scenes, on which
ceilings are measured, have seeds that no training used; those of held-out sprites also have subjects that no model saw.

A single subject is recognized in the whole image. Of two subjects, each is recognized in its own window. The windows
are where the prompt says that the subjects are: two squares side by side, or one above the other. The image counts as
correct if the two windows show the two kinds, in either order. Reference scenes are cropped in the same way.
"""
from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from torch import Tensor

from evaluation.mini.recognize import nearest_class
from ldm.common.paths import PROJECT_ROOT
from ldm.data.images import to_tensor
from ldm.data.mini.backgrounds import BACKGROUNDS
from ldm.data.mini.scenes import (
    BACKGROUND_NAMES,
    PLAIN_TEMPLATES,
    RELATIONS,
    Scene,
    SceneDataset,
    close_up_box,
    compose,
    with_article,
)
from ldm.data.mini.world import KIND_NAMES, KINDS

WORLD = PROJECT_ROOT / "configs" / "mini" / "text2img.yaml"
FIRST_SEED = 10_000  # of the scenes here; the seeds of training and validation in configs/mini/ are smaller
PLAIN = {"colored": 0.0, "patterned": 0.0, "sized": 0.0, "styled": 0.0, "empty_caption": 0.0}


@dataclass(frozen=True)
class ScenePrompt:
    """A prompt of the mini world.

    Attributes:
        prompt: the text.
        seed: seed of the image.
        kinds: names of the one or two kinds that the image has to show.
        background: name of the background; None if the prompt does not name it.
        scene: a scene that the prompt describes.
    """

    prompt: str
    seed: int
    kinds: tuple[str, ...]
    background: str | None
    scene: Scene


def plain_scenes(seed: int, num_subjects: int, held_out: bool = False) -> SceneDataset:
    """Return plain scenes as those that the text-to-image model was trained on, with one or two subjects in each."""
    params = OmegaConf.to_container(OmegaConf.load(WORLD).data.params.validation.params, resolve=True)
    for name in ("seed", "length", "held_out", "two_subjects"):
        params.pop(name, None)
    return SceneDataset(**{**params, **PLAIN}, seed=FIRST_SEED + seed, two_subjects=float(num_subjects == 2),
                        held_out=held_out)


def scene_prompts(count: int, seed: int, num_subjects: int, held_out: bool = False) -> list[ScenePrompt]:
    """Return `count` prompts with the scenes that they describe. They depend only on the arguments."""
    dataset = plain_scenes(seed, num_subjects, held_out)
    return [_scene_prompt(dataset.plan(index), 1000 * seed + index) for index in range(count)]


def _scene_prompt(scene: Scene, seed: int) -> ScenePrompt:
    _, phrases = BACKGROUNDS[scene.background]
    background = scene.background if scene.caption.endswith(phrases) else None
    return ScenePrompt(scene.caption, seed, tuple(subject.kind for subject in scene.subjects), background, scene)


def reference_images(prompts: Sequence[ScenePrompt], size: int = 64) -> Tensor:
    """Compose the scenes that the prompts describe: (N, 3, size, size) in [-1, 1]."""
    images = []
    for prompt in prompts:
        scene = prompt.scene
        image, _ = compose(scene.background, scene.variant, scene.subjects, size, scene.style)
        images.append(to_tensor(image))
    return torch.stack(images)


def kind_texts() -> list[list[str]]:
    """Return the texts of each kind: all its words in every plain template, and as a photo on every background."""
    templates = [*PLAIN_TEMPLATES, *(f"{PLAIN_TEMPLATES[0]} {phrases[0]}" for _, phrases in BACKGROUNDS.values())]
    return [[template.format(with_article(word)) for word in kind.words for template in templates] for kind in KINDS]


def background_texts() -> list[list[str]]:
    """Return the texts of each background: all its phrases, with a photo of every kind."""
    return [[f"a photo of {with_article(name)} {phrase}" for name in KIND_NAMES for phrase in phrases]
            for _, phrases in BACKGROUNDS.values()]


def subject_windows(images: Tensor, prompts: Sequence[ScenePrompt]) -> Tensor:
    """Crop the windows of the first and the second subject from each image, enlarged to its size.

    Args:
        images: (N, 3, H, W).
        prompts: N prompts of two subjects.

    Returns:
        (2 N, 3, H, W)
    """
    windows = []
    for image, prompt in zip(images, prompts, strict=True):
        windows += [window_at(image, center) for center in _layout_centers(prompt.scene)]
    return torch.stack(windows)


def _layout_centers(scene: Scene) -> list[tuple[float, float]]:
    """Return where the relation puts the two subjects of a scene, without the scene's own small offsets."""
    centers = [subject.center for subject in scene.subjects]

    def squared_distance(layout: Sequence[tuple[tuple[float, float], float]]) -> float:
        return sum((x - a) ** 2 + (y - b) ** 2 for (x, y), ((a, b), _) in zip(centers, layout, strict=True))

    nearest = min((layout for layout, _ in RELATIONS.values()), key=squared_distance)
    return [center for center, _ in nearest]


def window_at(image: Tensor, center: tuple[float, float]) -> Tensor:
    """Crop the window of an image (3, H, W) around a position (x, y) in [0, 1], enlarged to the image's size."""
    height, width = image.shape[-2:]
    left, top, right, bottom = close_up_box(center, width, height)
    crop = image[None, :, top:bottom, left:right]
    return F.interpolate(crop, (height, width), mode="bicubic", antialias=True)[0].clamp(-1, 1)


@dataclass(frozen=True)
class RecognitionResults:
    """Kinds and backgrounds that were recognized in the images of some prompts.

    Attributes:
        kinds: for each image one kind, or two in the order of the prompt.
        backgrounds: the background of each image.
    """

    kinds: list[tuple[str, ...]]
    backgrounds: list[str]

    def kind_hits(self, prompts: Sequence[ScenePrompt]) -> list[float]:
        """Return 100 for each image in which all kinds are recognized, else 0."""
        return [100.0 * (sorted(kinds) == sorted(prompt.kinds))
                for kinds, prompt in zip(self.kinds, prompts, strict=True)]

    def background_hits(self, prompts: Sequence[ScenePrompt]) -> list[float]:
        """Return 100 or 0 for each image whose prompt names a background."""
        return [100.0 * (background == prompt.background)
                for background, prompt in zip(self.backgrounds, prompts, strict=True) if prompt.background]

    def records(self, prompts: Sequence[ScenePrompt], images: str) -> list[dict[str, Any]]:
        """Return a record for a CSV file for each image; `images` says which images these are."""
        records = []
        for prompt, kinds, background in zip(prompts, self.kinds, self.backgrounds, strict=True):
            records.append({
                "images": images, "prompt": prompt.prompt, "seed": prompt.seed, "kinds": " + ".join(prompt.kinds),
                "recognized kinds": " + ".join(kinds), "background": prompt.background or "",
                "recognized background": background})
        return records


class SceneRecognizer:
    """Recognizes the kinds and the backgrounds of the mini world by the embeddings of a CLIP.

    Args:
        embedder: a `ldm.models.clip_encoder.ClipEncoder`, or another with its `embed_images` and `embed_classes`.
    """

    def __init__(self, embedder: Any) -> None:
        self.embedder = embedder

    @functools.cached_property
    def kinds(self) -> Tensor:
        """(100, d), one embedding per kind. Computed on first use: recognizing backgrounds does not need them."""
        return self.embedder.embed_classes(kind_texts(), "texts about kinds")

    @functools.cached_property
    def backgrounds(self) -> Tensor:
        """(20, d), one embedding per background."""
        return self.embedder.embed_classes(background_texts(), "texts about backgrounds")

    def recognize_backgrounds(self, images: Tensor) -> list[str]:
        """Return the background of each image (N, 3, H, W) in [-1, 1]."""
        return self._nearest_backgrounds(self.embedder.embed_images(images))

    def recognize(self, images: Tensor, prompts: Sequence[ScenePrompt]) -> RecognitionResults:
        """Recognize what images show.

        Args:
            images: (N, 3, H, W) in [-1, 1].
            prompts: N prompts, all with one subject or all with two.
        """
        embeddings = self.embedder.embed_images(images)
        count = len(prompts[0].kinds)
        subject_embeddings = embeddings
        if count == 2:
            subject_embeddings = self.embedder.embed_images(subject_windows(images, prompts))
        kinds = [KIND_NAMES[index] for index in nearest_class(subject_embeddings, self.kinds).tolist()]
        by_image = [tuple(kinds[start:start + count]) for start in range(0, len(kinds), count)]
        return RecognitionResults(by_image, self._nearest_backgrounds(embeddings))

    def _nearest_backgrounds(self, embeddings: Tensor) -> list[str]:
        return [BACKGROUND_NAMES[index] for index in nearest_class(embeddings, self.backgrounds).tolist()]
