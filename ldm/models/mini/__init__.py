"""Training of the parts that belong to the mini model only.

- `contrastive.py`: contrastive training of a CLIP; `openclip.py`: the same for CLIPs of `open_clip`
- `segmenter.py`: training of the zero-shot segmenter
"""
