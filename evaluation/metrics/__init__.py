"""Scores of images of a concept.

- `registry`: the list of metrics; tables, CSV columns and plots read it.
- `similarity`: text, image and object similarity by a CLIP, and what they share.
- `scoring`: scores images by all metrics, and estimates means.
- `captioned_images`: images of a folder with the prompts that they were generated from.
- `clip_evaluators`: similarities with the interface of Textual Inversion's public code.
- `settings`: what images are compared with, as plain values (imports no torch).
"""
