"""Digests of code: everything that runs counts, whatever the entry points import, and nothing else."""
from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from evaluation.paper import source_digest
from evaluation.paper.source_digest import (
    EVALUATION_ENTRIES,
    PRIOR_ENTRIES,
    TRAINING_ENTRIES,
    clear_caches,
    code_digest,
    config_targets,
    import_closure,
    normalized_source,
)
from ldm.common.paths import PROJECT_ROOT
from ldm.inference.settings import GenerationSettings
from ldm.sampling.samplers import SAMPLERS, sampler_class

PLAIN = "def double(x):\n    return 2 * x\n"
CONFIG = OmegaConf.to_container(OmegaConf.load(PROJECT_ROOT / "configs" / "perfusion.yaml"))
PERFUSION_TARGETS = tuple(config_targets(CONFIG))


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make an empty folder the project's root."""
    monkeypatch.setattr(source_digest, "PROJECT_ROOT", tmp_path)
    clear_caches()
    yield tmp_path
    clear_caches()


def write(root: Path, **files: str) -> None:
    """Write modules, such as `a__b` for a/b.py; packages get an empty __init__.py."""
    for name, source in files.items():
        path = root / f"{name.replace('__', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.parent != root:
            (path.parent / "__init__.py").touch()
        path.write_text(source)
    clear_caches()


@pytest.mark.parametrize("same", [
    '"""Numbers."""\ndef double(x):\n    """Return twice x."""\n    # or x + x\n    return (2\n            * x)\n',
    "def double(x): return 2*x"])
def test_docstrings_comments_and_layout_do_not_count(same: str) -> None:
    assert normalized_source(same) == normalized_source(PLAIN)


@pytest.mark.parametrize("other", [PLAIN.replace("2", "3"), PLAIN.replace("x)", "x=1)"), f"{PLAIN}NAME = '''text'''\n"])
def test_everything_that_runs_counts(other: str) -> None:
    assert normalized_source(other) != normalized_source(PLAIN)


def test_a_body_that_is_only_a_docstring_is_still_code() -> None:
    documented = 'class A:\n    """Docs."""\n    def b(self):\n        """More."""\n'
    assert normalized_source(documented) != normalized_source("class A:\n    pass\n")


@pytest.mark.parametrize("module", [
    "ldm.models.diffusion.pixel_diffusion", "ldm.models.diffusion.objectives", "ldm.models.diffusion.latent_diffusion",
    "ldm.personalization.perfusion", "ldm.personalization.base", "ldm.modules.rank_one", "ldm.data.personalized",
    "ldm.data.module", "ldm.modules.diffusionmodules.openaimodel", "ldm.training.run", "ldm.concepts.concept_file",
    "ldm.modules.encoders.clip"])
def test_training_covers_the_loss_and_all_that_it_needs(module: str) -> None:
    assert module in import_closure({*TRAINING_ENTRIES, *PERFUSION_TARGETS})


@pytest.mark.parametrize("module", ["ldm.inference.pipeline", "ldm.models.clip_encoder", "evaluation.mini.fidelity",
                                    "evaluation.metrics.similarity", "ldm.data.mini.scenes"])
def test_evaluation_covers_generation_and_metrics(module: str) -> None:
    assert module in import_closure(EVALUATION_ENTRIES)


def test_registries_and_facades_are_followed() -> None:
    closure = import_closure(EVALUATION_ENTRIES)
    assert {sampler_class(name).__module__ for name in SAMPLERS} <= set(closure)
    facade = import_closure(["ldm.inference.GenerationSettings", "ldm.models.diffusion.perfusion.Perfusion"])
    assert {GenerationSettings.__module__, "ldm.personalization.perfusion"} <= set(facade)


def test_other_methods_and_the_list_of_studies_do_not_count() -> None:
    training = import_closure({*TRAINING_ENTRIES, *PERFUSION_TARGETS})
    assert not {"ldm.personalization.dreambooth", "ldm.personalization.custom_diffusion"} & set(training)
    both = {**training, **import_closure(EVALUATION_ENTRIES)}
    assert not {"evaluation.paper.studies", "evaluation.paper.methods", "evaluation.paper.claims"} & set(both)


@pytest.mark.slow
def test_closures_are_quick_to_find() -> None:
    clear_caches()
    started = time.process_time()
    for entries in ({*TRAINING_ENTRIES, *PERFUSION_TARGETS}, EVALUATION_ENTRIES, PRIOR_ENTRIES):
        code_digest(entries)
    assert time.process_time() - started < 3  # about 0.6 s


def test_a_new_methods_own_file_counts_wherever_it_is(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = project / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.setattr(sys, "path", [str(elsewhere), *sys.path])
    write(elsewhere, my_method="from my_parts import constraint\nclass MyMethod: ...\n", my_parts=PLAIN)
    assert set(import_closure(["my_method.MyMethod"])) == {"my_method", "my_parts"}
    before = code_digest(["my_method.MyMethod"])
    write(elsewhere, my_parts=PLAIN.replace("2", "3"))
    assert code_digest(["my_method.MyMethod"]) != before


def test_imports_are_followed_in_all_their_forms(project: Path) -> None:
    write(project, a__entry="""
import a.plain
from a import sibling
from . import relative
from .inner import name
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    from a import for_annotations
def function():
    import a.in_function
TABLE = {"one": "a.registered.Class"}
HERE = "local.Class"
MOVED_TARGETS = {"old": "a.moved.Class"}
MOVED_TARGETS: dict = {"old": "a.moved.Class"}
WORD = "a photo. of a.unrelated"
""", **{f"a__{name}": "" for name in ("plain", "sibling", "relative", "inner", "for_annotations", "in_function",
                                       "registered", "local", "moved", "unrelated")})
    expected = ("plain", "sibling", "relative", "inner", "in_function", "registered", "local", "entry")
    assert set(import_closure(["a.entry"])) == {"a", *(f"a.{name}" for name in expected)}


def test_installed_libraries_do_not_count(project: Path) -> None:
    write(project, entry="import torch.nn\nimport json\nfrom omegaconf import OmegaConf\n")
    assert set(import_closure(["entry", "torch.nn.Identity", "json.dumps", "sys", "nowhere.Class"])) == {"entry"}


def test_a_change_of_any_module_changes_the_digest(project: Path) -> None:
    digests = []
    for a, b in ((PLAIN, "B = 1"), ("# twice\n" + PLAIN, "B = 1  # one"), (PLAIN, "B = 2"), ("B = 2", PLAIN)):
        write(project, a=a, b=b)
        digests.append(code_digest(["a", "b"]))
    assert digests[0] == digests[1] and len(set(digests)) == 3
    write(project, a=PLAIN, b="B = 1", c="")
    assert code_digest(["a", "b"]) == digests[0] != code_digest(["a", "b", "c"])


def test_targets_are_found_at_any_depth() -> None:
    config = {"model": {"target": "a.A", "params": {"parts": [{"target": "b.B"}, {"other": 1}], "target": None}}}
    assert sorted(config_targets(config)) == ["a.A", "b.B"]
