"""The ComfyUI nodes on stand-ins, with two concepts of a small model, and our own U-Net as their oracle."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from helpers.comfyui import StandInClip, StandInModel, predict
from helpers.diffusers_pipelines import Family, requests_of
from ldm.concepts.concept_file import save_perfusion_concepts
from ldm.integrations.comfyui import nodes

TWO = "a <teddy> beside a <pot>"
LATENTS = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(7))


class LoadedNodes:
    """A family's model as ComfyUI has it, before and after its two concepts are loaded by the node."""

    def __init__(self, family: Family, folder: Path) -> None:
        self.own, model = family.own, family.own.pipeline.model
        for name, concept in zip(("teddy", "pot"), family.concepts, strict=True):
            concept = replace(concept, word_parts=dict(model.cond_stage_model.word_parts))
            save_perfusion_concepts(folder / f"{name}.safetensors", [concept], precision=None)
        self.base = StandInModel(model.model.diffusion_model), StandInClip(model.cond_stage_model)
        load = nodes.LoadPerfusionConcept().load
        self.one = load(*self.base, "teddy.safetensors")[:2]
        self.two = load(*self.one, "pot.safetensors")[:2]

    def oracle(self, prompt: str, negative: str = "", global_locking: bool = False) -> list[Tensor]:
        """Return what our U-Net predicts for prompt and negative prompt."""
        model = self.own.pipeline.model
        with torch.no_grad():
            return [model.apply_model(LATENTS, torch.tensor([500]), context)
                    for context in self.own.contexts(requests_of((prompt, negative)), global_locking)]


def folder_paths(folder: Path) -> ModuleType:
    """Return a stand-in for ComfyUI's module of that name, with one folder of concepts."""
    module = ModuleType("folder_paths")
    module.models_dir = str(folder)
    module.folder_names_and_paths = {}
    module.get_filename_list = lambda name: sorted(path.name for path in folder.glob("*.safetensors"))
    module.get_full_path = lambda name, file: str(folder / file) if (folder / file).is_file() else None
    return module


def settled(model: StandInModel, clip: StandInClip, prompt: str, negative: str = "", **settings: Any) -> list[Tensor]:
    """Return the U-Net's predictions for texts that Perfusion Text Encode encoded."""
    given = {"bias": -1.0, "temperature": -1.0, "lock": "local", **settings}
    encode = nodes.PerfusionTextEncode().encode
    return predict(model, [encode(clip, prompt, **given)[0], encode(clip, negative, **given)[0]], LATENTS)


def assert_close(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
