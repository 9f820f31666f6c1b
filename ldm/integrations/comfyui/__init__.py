"""Custom nodes for ComfyUI: generate with concepts that Perfusion has learned.

Copy or link this folder into `custom_nodes/` of ComfyUI. It needs torch and safetensors, which ComfyUI has, and nothing
of the rest of the project. See README.md.
"""
from __future__ import annotations

from .folders import register_folder
from .nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]

register_folder()
