"""Measures what the models can do: the bundled base model, and the recognisers that grade pictures."""
