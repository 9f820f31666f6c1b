"""Train what a config describes: a concept, a base model, a first stage.

    from ldm.training import train_concept

    trained = train_concept("photos/", "teddy bear", placeholder="<my-teddy>")
    trained.path         # the concept's file, for `PerfusionPipeline.load_concepts`

Modules:
    concept_training.py   train_concept: learn concepts from Python
    options.py            TrainingOptions, the options of a run (imports no torch, so command lines start fast)
    early_checks.py       checks the files that a command line names before torch is imported
    plan.py               plan_run: all that is checked before torch is imported
    likely_kinds.py       what photos look like, if no super-category is given
    resuming.py           compares a resumed run with the one that it goes on from
    input_files.py        what the files that a config names held when a run began
    config.py             YAML files, options and overrides -> the config of a run
    run.py                train: a log folder, a model, its data and a trainer, from beginning to end
    trainer.py            Lightning's trainer with the callbacks that a config asks for
    checkpoint_io.py      how checkpoints are written
    log_folder.py         the folder that a run writes to, and the checkpoint that it resumes from
    callbacks.py          configs and sample grids in the log folder, progress, stopping cleanly
    concept_callbacks.py  concept files, and previews before, during and after training
    encoder_options.py    options of train_encoder (imports no torch)
    encoder_images.py     images of subjects by a base model, for a concept encoder of its own
    encoder_training.py   train_encoder: makes them, trains the encoder, and writes it
    next_command.py       the command that generates with a run's concepts, logged at its end
    run_record.py         records machine, steps, time and losses of a finished run beside its weights
"""
from ldm.common.lazy_imports import forward_names

__getattr__ = forward_names(__name__, {
    "TrainedConcept": "ldm.training.concept_training",
    "TrainingOptions": "ldm.training.options",
    "train_concept": "ldm.training.concept_training",
})
