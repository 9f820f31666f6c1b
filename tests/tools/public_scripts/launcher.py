"""Child process of `run.py`: run one script, unchanged, as __main__ with a chosen `ldm` first on Python's path.

    python -m public_scripts.launcher ORDER.json

Python puts a script's own folder first on its path, which in a repository's root would hide the chosen package behind
the repository's own `ldm`. So the script's file is run from here, after the path is set.
"""
from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import random
import runpy
import sys
from pathlib import Path
from typing import Any

from public_scripts.stand_ins import install


def main(order_file: Path) -> None:
    """Carry out the order that `run.launch` wrote."""
    order = json.loads(order_file.read_text())
    tools = str(Path(__file__).resolve().parents[1])
    sys.path[:] = order["path"] + [entry for entry in sys.path if entry not in ("", tools)]
    sys.argv = [order["script"], *order["arguments"]]
    script = Path(order["script"])
    install(script.read_text(), order["original"], order["transformers4"], order["seed"], order["hub"])
    for name in order["stand_ins"]:
        module, function = name.split(":")
        getattr(importlib.import_module(module), function)()
    check_package(order["path"])
    seed_generators(order["seed"])
    if script.suffix == ".ipynb":
        run_notebook(script)
    else:
        runpy.run_path(str(script), run_name="__main__")


def check_package(path: list[str]) -> None:
    """Raise ImportError if `ldm` would not be imported from the first folder of `path` that has one."""
    wanted = next((Path(entry) / "ldm" for entry in path if (Path(entry) / "ldm").is_dir()), None)
    found = importlib.util.find_spec("ldm")
    folders = [Path(folder).resolve() for folder in found.submodule_search_locations] if found else []
    if wanted is not None and wanted.resolve() not in folders[:1]:
        raise ImportError(f"ldm comes from {folders}, not from {wanted}")


def seed_generators(seed: int) -> None:
    """Seed all generators: some scripts set no seed."""
    import numpy
    import torch

    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)


def run_notebook(file: Path) -> None:
    """Run a notebook's code cells as one module; save images that cells show as `cell-NUMBER.png`.

    Lines for the shell and for IPython (`!`, `%`) are left out: they download and install.
    """
    cells = json.loads(file.read_text())["cells"]
    names: dict[str, Any] = {"__name__": "__main__"}
    for number, cell in enumerate(cells):
        if cell["cell_type"] != "code":
            continue
        lines = "".join(cell["source"]).splitlines()
        shown = run_cell("\n".join(line for line in lines if not line.startswith(("!", "%"))), names)
        if hasattr(shown, "save"):
            shown.save(f"cell-{number}.png")


def run_cell(source: str, names: dict[str, Any]) -> Any:
    """Run a cell and return the value of its last line, if that is an expression."""
    body = ast.parse(source).body
    last = body.pop() if body and isinstance(body[-1], ast.Expr) else None
    exec(compile(ast.Module(body, type_ignores=[]), "cell", "exec"), names)
    return eval(compile(ast.Expression(last.value), "cell", "eval"), names) if last else None


if __name__ == "__main__":
    main(Path(sys.argv[1]))
