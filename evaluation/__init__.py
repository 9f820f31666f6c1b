"""Evaluation of models and concepts: commands, and one package for each part of their work.

Commands:
    base_model.py   accuracy of the mini model on its world
    clip_eval.py    text and image similarity of images
    pareto.py       text similarity against image similarity along the bias
    reproduce.py    the paper's comparisons, and whether its claims hold

Packages:
    prompts/        lists of prompts
    sweeps/         images of one concept over prompts, seeds and settings
    metrics/        similarities by a CLIP
    mini/           what can be recognized in the mini world
    attention/      attention maps
    stats/          means with intervals, and trade-off curves
    output/         tables, plots and image grids
    paper/          the paper's comparisons
"""
