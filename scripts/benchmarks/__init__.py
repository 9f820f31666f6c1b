"""The parts of `scripts/benchmark.py`: each has a function `measure` that yields its rows as they are found."""
