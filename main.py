"""Trains whatever a config describes: a concept, a base model, a first stage.

    python main.py --base configs/perfusion.yaml
    python main.py --base configs/perfusion.yaml --data_root photos/ --init_word "teddy bear" --placeholder "<my-teddy>"
"""
from __future__ import annotations

from importlib import import_module
from typing import Any

from ldm.common.errors import one_line_errors
from ldm.training.config import get_parser

# Public configs name these as `main.…`. Imported when they are asked for: torch and Lightning take their time.
NAMES = {"DataModuleFromConfig": "ldm.data.module", "ImageLogger": "ldm.training.callbacks",
         "SetupCallback": "ldm.training.callbacks"}


def __getattr__(name: str) -> Any:
    if name not in NAMES:
        raise AttributeError(f"main has no {name}")
    return getattr(import_module(NAMES[name]), name)


@one_line_errors
def main() -> None:
    get_parser().parse_known_args()  # for --help and mistyped flags, which are so answered at once
    from ldm.training.run import main as train

    train()


if __name__ == "__main__":
    main()
