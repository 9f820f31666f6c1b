"""Import Textual Inversion's evaluators as its users do."""
from evaluation.clip_eval import ImageDirEvaluator, LDMCLIPEvaluator

print(LDMCLIPEvaluator, ImageDirEvaluator)
