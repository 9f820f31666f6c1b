"""Trains whatever a config describes: a concept, a base model, a first stage.

    python main.py --base configs/perfusion.yaml
    python main.py --base configs/perfusion.yaml --data_root photos/ --init_word "teddy bear" --placeholder "<my-teddy>"
"""
from __future__ import annotations

from ldm.data.module import DataModuleFromConfig
from ldm.errors import one_line_errors
from ldm.training.callbacks import ImageLogger, SetupCallback
from ldm.training.run import main as train

# Public configs name these two as `main.…`.
__all__ = ["DataModuleFromConfig", "ImageLogger", "SetupCallback"]

if __name__ == "__main__":
    one_line_errors(train)()
