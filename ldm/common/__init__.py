"""Helpers without any knowledge of models. They import no torch, or only when it is needed.

    errors.py         `UserError`, and how commands print it as one line
    atomic_write.py   atomic writes, and new files under free names
    files.py          safetensors files
    paths.py          paths that users and configs name
    words.py          comparison of words, and whole words in prompts
    prompt_file.py    files of prompts, and `{}` in prompts
    text_files.py     text in UTF-8, and its lines
    annotations.py    checks of YAML values against type annotations
    hub.py            whether a model of the hub can be had
    progress.py       bars in terminals, lines in log files
    lazy_imports.py   public names that are imported on first access
    threads.py        how idle threads wait
"""
