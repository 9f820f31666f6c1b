"""Use concepts in other programs, each in a package of its own that imports its library only there.

    comfyui/      a folder of custom nodes for ComfyUI
    diffusers/    `load_concepts(pipe, files)` for the pipelines of Hugging Face's diffusers
"""
