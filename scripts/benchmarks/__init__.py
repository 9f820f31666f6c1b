"""The parts of `scripts/benchmark.py`. Each module has a function `measure` that yields rows as they are measured."""
