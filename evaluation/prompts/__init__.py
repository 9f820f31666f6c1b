"""Evaluation prompts: the bundled lists and the code that reads them."""
