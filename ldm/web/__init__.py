"""The web page: teach, generate, combine and compare in a browser, on this machine.

The page holds no state of its own. Runs live in folders, so a reload, a second tab or a killed page loses nothing.

    run_folder     one training run as a folder: photos, masks, settings, state
    run_queue      all runs: start one at a time as `main.py` in a process of its own, stop, continue, delete
    run_progress   what a run shows while it trains: steps, losses, previews, the end of its log
    uploads        check uploaded files as photos, and copy them into a run
    draft          the run that is being prepared
    teach_tab, generate_tab, combine_tab, compare_tab    the tabs, with their forms in `*_form`
    generation     generate for one request at a time, with the pipeline that `site` keeps loaded
    endpoints      what other programs may call
    model_imports  import torch late, and in one thread at a time

Gradio is imported by the modules of the page only (`pip install -e ".[web]"`).
"""
