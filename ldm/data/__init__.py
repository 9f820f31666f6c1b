"""Data sets and loaders.

- `images.py`: image files -> upright RGB images, crops, tensors; `masks.py`: masks; `contact_sheet.py`: PNG sheets
- `personalized.py`: the photos of one concept as a training set, with captions from `templates.py`
- `folder.py`: a folder of images, for first stages and unconditional models
- `module.py`: loaders for these from a config (`main.DataModuleFromConfig`)
- `mini/`: the mini world, in which the bundled models were trained
"""
