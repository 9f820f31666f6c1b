"""Build the bundled mini model from its sources.

- `rebuild.py`: everything, part by part
- `fetch_sprites.py`: the sprites of the mini world, from six emoji sets
- `export.py`: from training runs to the files in `models/mini/`
- `make_example_concepts.py`: the photos of the ten example concepts
"""
