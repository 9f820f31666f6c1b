"""Where concept files lie: `models/perfusion` of ComfyUI, and what `extra_model_paths.yaml` names `perfusion`."""
from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from types import ModuleType

from .errors import PerfusionError

FOLDER = "perfusion"
EXTENSIONS = {".safetensors"}


def register_folder() -> None:
    """Tell ComfyUI of the folder, and create it. Nothing happens where there is no ComfyUI."""
    if importlib.util.find_spec("folder_paths") is None:
        return
    folder_paths = _folder_paths()
    default = Path(folder_paths.models_dir, FOLDER)
    default.mkdir(parents=True, exist_ok=True)
    paths, _ = folder_paths.folder_names_and_paths.get(FOLDER, ([], set()))
    added = [] if str(default) in paths else [str(default)]
    folder_paths.folder_names_and_paths[FOLDER] = ([*paths, *added], EXTENSIONS)


def concept_files() -> list[str]:
    """Return the names of the files in the folders."""
    return _folder_paths().get_filename_list(FOLDER)


def concept_path(name: str) -> str:
    """Return the path of a file.

    Raises:
        PerfusionError: there is none of that name.
    """
    path = _folder_paths().get_full_path(FOLDER, name)
    if path is None:
        raise PerfusionError(f"{name}: no such concept; put the file into models/perfusion and refresh the list")
    return path


def _folder_paths() -> ModuleType:
    """Return ComfyUI's module of paths, which exists only while ComfyUI runs."""
    return importlib.import_module("folder_paths")
