"""Results in files and on the screen.

- `table`: Markdown tables that are printed line by line, and CSV files.
- `goals`: measurements beside their goals, as `base_model.py` prints them.
- `plots`: curves and bars with intervals, as PNG.
- `image_grid`: images in a labeled grid, as PNG.
- `file_names`: names of files from text.
"""
