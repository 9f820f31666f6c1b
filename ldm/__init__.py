"""Perfusion on latent diffusion models. `docs/architecture.md` is the map of this package.

    cli/               flags of the commands
    training/          a training run; `train_concept`
    inference/         `PerfusionPipeline`
    personalization/   the methods that learn concepts
    models/            diffusion models, samplers, first stages
    concepts/          concepts as values, their files and their prompts
    modules/           the edit, attention, the U-Net, text encoders
    checkpoints/       reading weights of any format
    data/              photos, masks, data sets
    common/            errors, files, paths, words
"""
