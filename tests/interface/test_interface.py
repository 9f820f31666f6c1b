"""The package has the LDM family's interface, which is written down in the YAML files of this folder.

Our own form differs in places: see `deliberate.yaml` and `left_out.yaml`, which give the reasons.
"""
from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.tiny_models import build_model, first_stage_config, unet_config
from interface.signatures import differences, parse_signature
from torch import nn

from ldm.util import instantiate_from_config

FOLDER = Path(__file__).parent
FILES = ("models", "modules", "data_and_utilities")


def read(name: str) -> dict[str, Any]:
    return yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))


def signatures() -> Iterator[tuple[str, str]]:
    """Yield the full name of each function and method, and its signature as text."""
    for file in FILES:
        for module, names in read(file).items():
            for name, content in names.items():
                if isinstance(content, str):
                    yield f"{module}.{name}", content
                else:
                    yield from ((f"{module}.{name}.{method}", text) for method, text in content.items())


def classes() -> list[str]:
    return [f"{module}.{name}" for file in FILES for module, names in read(file).items()
            for name, content in names.items() if isinstance(content, dict)]


def left_out_names() -> list[str]:
    return [f"{module}.{name}" for module, reasons in read("left_out")["names"].items()
            for names in reasons.values() for name in names]


WRITTEN = dict(signatures())
DELIBERATE, LEFT_OUT, ATTRIBUTES = read("deliberate"), read("left_out"), read("attributes")


def find(name: str) -> tuple[Any, bool]:
    """Return the object of a full name, and whether it is a method that is called on an instance.

    Raises:
        ImportError, AttributeError: if it does not exist.
    """
    parts = name.split(".")
    depth = len(parts)
    while not is_module(".".join(parts[:depth])):
        depth -= 1
    found, owner = importlib.import_module(".".join(parts[:depth])), None
    for part in parts[depth:]:
        owner, found = found, getattr(found, part)
    kinds = (staticmethod, classmethod)
    bound = inspect.isclass(owner) and not isinstance(inspect.getattr_static(owner, parts[-1]), kinds)
    return found, bound


def is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


@pytest.mark.parametrize("name", WRITTEN)
def test_signature(name: str) -> None:
    text = DELIBERATE[name]["ours"] if name in DELIBERATE else WRITTEN[name]
    function, is_method = find(name)
    assert not list(differences(parse_signature(text), function, is_method))


@pytest.mark.parametrize("name", classes())
def test_class_exists(name: str) -> None:
    assert inspect.isclass(find(name)[0])


@pytest.mark.parametrize("name", DELIBERATE)
def test_deliberate_differences_are_needed(name: str) -> None:
    function, is_method = find(name)
    assert list(differences(parse_signature(WRITTEN[name]), function, is_method))
    assert DELIBERATE[name]["reason"]


@pytest.mark.parametrize("name", LEFT_OUT["modules"])
def test_left_out_modules(name: str) -> None:
    with pytest.raises(ModuleNotFoundError, match=name.rpartition(".")[2]):
        importlib.import_module(name)


@pytest.mark.parametrize("name", left_out_names())
def test_left_out_names(name: str) -> None:
    with pytest.raises(AttributeError, match=name.rpartition(".")[2]):
        find(name)
    assert name not in WRITTEN


# Attributes, of small instances


def sampler(name: str, model: Any) -> Any:
    found = find(name)[0](model)
    if hasattr(found, "make_schedule"):
        found.make_schedule(5, verbose=False)
    return found


def instances(folder: Path) -> dict[str, Callable[[], Any]]:
    """Return a function for each class that has attributes in `attributes.yaml`, which builds a small instance."""
    model = build_model(folder)
    shape = first_stage_config()["params"]["ddconfig"]
    lossconfig = {"target": "torch.nn.Identity"}
    samplers = {name: (lambda name=name: sampler(name, model)) for name in ATTRIBUTES if name.endswith("Sampler")}
    params: dict[str, tuple[Any, ...] | dict[str, Any]] = {
        "autoencoder.VQModelInterface": {"embed_dim": 4, "n_embed": 8, "ddconfig": {**shape, "double_z": False},
                                         "lossconfig": lossconfig},
        "attention.CrossAttention": (32,), "attention.BasicTransformerBlock": (32, 2, 16),
        "attention.SpatialTransformer": (32, 2, 16), "attention.SpatialSelfAttention": (32,),
        "openaimodel.ResBlock": (32, 64, 0.0), "model.Encoder": shape, "model.Decoder": shape,
        "distributions.DiagonalGaussianDistribution": (torch.zeros(1, 8, 2, 2),), "ema.LitEma": (nn.Linear(2, 2),),
        "embedding_manager.EmbeddingManager": (model.cond_stage_model, ["*"]),
        "modules.BERTEmbedder": (32, 1), "modules.ClassEmbedder": (16,), "modules.SpatialRescaler": (),
    }
    parts = {"ddpm.DDPM": lambda: model, "ddpm.LatentDiffusion": lambda: model,
             "ddpm.DiffusionWrapper": lambda: model.model,
             "autoencoder.AutoencoderKL": lambda: model.first_stage_model,
             "modules.FrozenCLIPEmbedder": lambda: model.cond_stage_model,
             "openaimodel.UNetModel": lambda: instantiate_from_config(unet_config())}
    return samplers | {name: _builder(name, parts, params) for name in ATTRIBUTES if name not in samplers}


def _builder(name: str, parts: dict[str, Callable[[], Any]], params: dict[str, Any]) -> Callable[[], Any]:
    """Return the function that builds an instance of a class: a part of the model, or one built from its params."""
    short = ".".join(name.split(".")[-2:])
    if short in parts:
        return parts[short]
    given = params[short]
    return lambda: find(name)[0](**given) if isinstance(given, dict) else find(name)[0](*given)


@pytest.fixture(scope="module")
def builders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Callable[[], Any]]:
    return instances(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_attributes(name: str, builders: dict[str, Callable[[], Any]]) -> None:
    instance = builders[name]()
    assert not [attribute for attribute in ATTRIBUTES[name] if not hasattr(instance, attribute)]
