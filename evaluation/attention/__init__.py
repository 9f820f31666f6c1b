"""Record and measure where in the image a word is attended to, for `scripts/attention_maps.py`.

- `settings`: the options of the script, as plain values (imports no torch).
- `cases`: generates one prompt with several concept files, and records the maps.
- `object_masks`: where the object is in each image.
- `masked_attention`: how much of the attention lies inside a mask.
- `figure`: all maps in one figure.
- `report`: the figure, the CSV and the JSON of a run.
"""
