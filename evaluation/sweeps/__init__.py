"""Generate images of concepts and score them: with one setting, or along curves of settings.

- `samples`: images of many prompts and seeds from one pipeline.
- `clip_evaluation`: what `clip_eval.py` does.
- `sweep`: curves of settings, and the scores of each point.
- `pareto_curves`: what `pareto.py` does.
- `settings`: the options of both commands, as plain values (imports no torch).
"""
