"""The mini world: synthetic scenes with exact captions and masks, in which the bundled models were trained.

- `world.py`: kinds of subjects, their sprites (emoji images), colors and patterns
- `backgrounds.py`: 20 painted backgrounds; `styles.py`: sketch, pixel art and painting
- `scenes.py`: composes scenes of these, with captions (`SceneDataset`)
- `composed_subjects.py`: subjects of scenes with masks and the words for their looks, for the concept encoder
- `attribute_captions.py`: captions whose attributes belong to one noun
- `augmentation.py`: augmentation of images together with their masks
- `example_concepts.py`: the ten concepts to learn, which no bundled model has seen
"""
