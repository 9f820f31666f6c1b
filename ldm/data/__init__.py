"""Data sets and loaders.

- `images.py`: image files and folders -> upright sRGB images, crops, tensors; it uses `file_kinds.py` (what a file is),
  `decoding.py` (Pillow and its plugins) and `color.py` (profiles -> sRGB; `matrix_profile.py` makes some)
- `masks.py`: masks; `contact_sheet.py`: PNG sheets
- `concept_photos.py`: the photos of one concept as a training set, with captions from `templates.py`
- `folder.py`: a folder of images, for first stages and unconditional models
- `module.py`: loaders for these from a config (`main.DataModuleFromConfig`)
- under the LDM family's names: `personalized.py` and `personalized_style.py` (Textual Inversion and DreamBooth, with
  captions from `imagenet_templates.py`), `lsun.py`, `imagenet.py`, `base.py`, `utils.py`; `pixel_arrays.py` reads their
  images
- `mini/`: the mini world, in which the bundled models were trained
"""
