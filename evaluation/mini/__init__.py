"""Evaluation of the bundled mini model and of concepts on it. Only the mini world allows these measurements.

- `model_quality.py`: the rows of the base model's table; `settings.py`: what to measure
- `parts.py`: first stage, CLIP and segmenter by themselves, time and size
- `world_prompts.py`: prompts, and recognition of kinds and backgrounds in images of them
- `fidelity.py`: recognition of the example concepts by their attributes
- `recognize.py`: classification by embeddings
"""
