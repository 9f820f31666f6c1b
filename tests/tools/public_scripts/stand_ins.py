"""Stand-ins for what public scripts of 2022 need and a machine of today lacks. They are the same for both packages.

| stand-in | because |
|---|---|
| `no_cuda` | scripts ask for "cuda"; without one, everything stays on the CPU |
| `local_hub` | tokenizers and towers are loaded by their hub names; nothing is downloaded |
| `safety_checker` | Stable Diffusion's script loads it from the hub; this one accepts every image |
| `watermark` | `imwatermark` and OpenCV are needed for the watermark alone; this one leaves images unchanged |
| `absent_packages` | imports of packages that no run calls succeed if they are not installed |
| `lossless_images` | a JPEG hides small differences and invents others; a PNG is saved beside it |
| `seeds_after_loading` | weights are initialized at random before they are loaded, with numbers of the same generator |
| `old_lightning` | scripts import names of Lightning 1 |

For the original code alone: `old_torch_load` and, where it needs transformers 4, `old_clip`.
"""
from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import importlib.util
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy
import torch
from PIL import Image
from torch.overrides import TorchFunctionMode

# Packages that modules import at their top and that no run calls.
UNUSED_PACKAGES = ("albumentations", "clip", "cleanfid", "dctorch", "jsonmerge", "lmdb", "skimage", "streamlit",
                   "streamlit_drawable_canvas", "torchdiffeq", "torchsde", "wandb")


def install(source: str, original: bool, transformers4: bool, seed: int, hub: Mapping[str, str]) -> None:
    """Install the stand-ins before a script runs.

    Args:
        source: the script's text, for what only some scripts need.
        original: whether the original code runs, which needs names of older packages.
        transformers4: whether CLIP's text model must have its old attributes.
        seed: for `seeds_after_loading`.
        hub: name on the hub -> local folder.
    """
    no_cuda()
    absent_packages()
    watermark()
    lossless_images()
    seeds_after_loading(seed)
    old_lightning()
    if hub:
        local_hub(hub)
    if "safety_checker" in source:
        safety_checker()
    if original:
        old_torch_load()
    if transformers4 and original:
        from public_scripts.old_clip import install_old_clip

        install_old_clip()


# Devices


class _OnCPU(TorchFunctionMode):
    """Replace the device "cuda" in calls of torch by the CPU."""

    def __torch_function__(self, function: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (),
                           kwargs: Mapping[str, Any] | None = None) -> Any:
        if function is torch.Tensor.cuda:
            return args[0]
        kwargs = {key: _on_cpu(value) for key, value in (kwargs or {}).items()}
        return function(*(_on_cpu(value) for value in args), **kwargs)


def _on_cpu(value: Any) -> Any:
    if isinstance(value, str | torch.device) and str(value).startswith("cuda"):
        return torch.device("cpu")
    return value


def no_cuda() -> None:
    """Keep everything on the CPU if this machine has no CUDA device."""
    if not torch.cuda.is_available():
        from lightning_fabric.utilities.device_dtype_mixin import _DeviceDtypeModuleMixin

        _OnCPU().__enter__()
        _DeviceDtypeModuleMixin.cuda = torch.nn.Module.cuda  # Lightning's asks the driver for the device's number


# Files and packages


def local_hub(hub: Mapping[str, str]) -> None:
    """Load tokenizers and towers that are named by the hub from local folders."""
    import transformers

    for name in ("CLIPTokenizer", "CLIPTextModel", "BertTokenizerFast"):
        _redirect(getattr(transformers, name), hub)


def _redirect(kind: Any, hub: Mapping[str, str]) -> None:
    """Let `kind.from_pretrained` look up names in `hub` first."""
    load = kind.from_pretrained.__func__

    def from_pretrained(cls: type, name: str | Path, *args: Any, **options: Any) -> Any:
        return load(cls, hub.get(str(name), name), *args, **options)

    kind.from_pretrained = classmethod(from_pretrained)


def safety_checker() -> None:
    """Let Stable Diffusion's safety checker be built without a download; it accepts every image."""
    import transformers
    from diffusers.pipelines.stable_diffusion import safety_checker as module

    class Extractor:
        @classmethod
        def from_pretrained(cls, name: str) -> Extractor:
            return cls()

        def __call__(self, images: Sequence[Image.Image], return_tensors: str) -> Any:
            return transformers.BatchFeature({"pixel_values": torch.zeros(len(images), 3, 1, 1)})

    class Checker(Extractor):
        def __call__(self, images: numpy.ndarray, clip_input: torch.Tensor) -> tuple[numpy.ndarray, list[bool]]:
            return images, [False] * len(images)

    transformers.AutoFeatureExtractor = Extractor
    module.StableDiffusionSafetyChecker = Checker


def watermark() -> None:
    """Leave images without a watermark."""

    class WatermarkEncoder:
        def set_watermark(self, kind: str, content: bytes) -> None:
            """Accept a watermark."""

        def encode(self, image: numpy.ndarray, method: str) -> numpy.ndarray:
            return image

    add_module("imwatermark", WatermarkEncoder=WatermarkEncoder)
    if importlib.util.find_spec("cv2") is None:
        add_module("cv2", COLOR_RGB2BGR=4, cvtColor=lambda image, code: image[:, :, ::-1])


def add_module(name: str, **content: Any) -> None:
    module = ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    vars(module).update(content)
    sys.modules[name] = module


class _AbsentModule(ModuleType):
    """A module whose names can be imported, and complain only if they are called."""

    __path__: Sequence[str] = ()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def absent(*args: Any, **kwargs: Any) -> None:
            raise ModuleNotFoundError(f"{self.__name__}.{name} was called, and {self.__name__} is not installed")

        return absent


class _AbsentPackages(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Import hook, asked last: it finds the packages that are not installed."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] not in UNUSED_PACKAGES:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _AbsentModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Leave the module empty."""


def absent_packages() -> None:
    """Let packages be imported that are not installed and not used."""
    sys.meta_path.append(_AbsentPackages())


def lossless_images() -> None:
    """Save a PNG beside every JPEG."""
    save = Image.Image.save

    @functools.wraps(save)
    def save_both(image: Image.Image, file: Any, *args: Any, **options: Any) -> None:
        save(image, file, *args, **options)
        if isinstance(file, str | Path) and Path(file).suffix == ".jpg":
            save(image, Path(f"{file}.png"))

    Image.Image.save = save_both


# Random numbers


def seeds_after_loading(seed: int) -> None:
    """Seed all generators when a module has loaded its weights.

    Scripts set the seed before they build the model. How many numbers the initialization of the weights takes depends
    on the versions of torch, transformers and open_clip.
    """
    load = torch.nn.Module.load_state_dict

    @functools.wraps(load)
    def load_and_seed(module: torch.nn.Module, *args: Any, **options: Any) -> Any:
        result = load(module, *args, **options)
        random.seed(seed)
        numpy.random.seed(seed)
        torch.manual_seed(seed)
        return result

    torch.nn.Module.load_state_dict = load_and_seed


# Older versions


def old_lightning() -> None:
    """Add the names of Lightning 1 that the originals import."""
    from pytorch_lightning.utilities.rank_zero import rank_zero_only

    add_module("pytorch_lightning.utilities.distributed", rank_zero_only=rank_zero_only)


def old_torch_load() -> None:
    """Let `torch.load` read every pickle by default, as before torch 2.6. The files here are this tool's own."""
    torch.load = functools.partial(torch.load, weights_only=False)
