"""The paper's comparisons on one base model, for `evaluation/reproduce.py`.

What is compared (imports no torch):
    design.py            methods, variants, curves and studies as plain values
    methods.py           the methods; one entry for each
    studies.py           the studies; one function for each
    settings.py          options of the command

Intermediate results, each in files whose names contain a key of everything that they depend on:
    training_runs.py     concepts, by runs of main.py; processes.py starts and ends these
    evaluation_runs.py   images, and what is measured in them
    evaluators.py        the models that generate and measure; prompt_cases.py has prompts and seeds
    file_keys.py         keys of settings and files; source_digest.py those of the code

Evaluation of the results:
    results.py           results of one study
    claims.py            claims about each study; decisions.py has the rule that decides
    tables.py            tables and figures; report.py writes them and the summary
    reproduction.py      carries out the studies, one after the other
"""
