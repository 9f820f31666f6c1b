"""A model of each family with concepts, its pipeline of diffusers, and the ComfyUI nodes; each test loads them anew."""
from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import sdxl
from diffusers import DDIMScheduler
from helpers import tiny_models
from helpers.comfyui_nodes import LoadedNodes, folder_paths
from helpers.diffusers_pipelines import DDIM, Family, OwnSampler, make_concept, stable_diffusion

from ldm.integrations.diffusers import unload_concepts


@pytest.fixture(scope="session")
def sd1(tmp_path_factory: pytest.TempPathFactory) -> Family:
    model = tiny_models.build_model(tmp_path_factory.mktemp("sd1"), use_ema=False).eval()
    concepts = [make_concept(model, "<teddy>", "teddy bear", 1), make_concept(model, "<pot>", "pot", 2)]
    return Family(OwnSampler(model, concepts), stable_diffusion(model), concepts)


@pytest.fixture(scope="session")
def xl() -> Family:
    model = sdxl.small_model().eval()
    concepts = [make_concept(model, "<teddy>", "teddy bear", 1),
                make_concept(model, "<pot>", "pot", 2, pooled="concept")]
    pipe = sdxl.as_diffusers(model)
    pipe.scheduler = DDIMScheduler(**DDIM)
    pipe.set_progress_bar_config(disable=True)
    return Family(OwnSampler(model, concepts, sdxl.small_config()), pipe, concepts)


@pytest.fixture
def family(request: pytest.FixtureRequest) -> Iterator[Family]:
    """The family that the test names, sd1 if it names none."""
    family = request.getfixturevalue(getattr(request, "param", "sd1"))
    yield family
    unload_concepts(family.pipe)


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which the ComfyUI nodes look for concepts."""
    monkeypatch.setitem(sys.modules, "folder_paths", folder_paths(tmp_path))
    return tmp_path


@pytest.fixture
def comfy(sd1: Family, files: Path) -> LoadedNodes:
    """The ComfyUI nodes with both concepts of sd1."""
    return LoadedNodes(sd1, files)
