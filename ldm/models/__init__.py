"""Diffusion models, first stages, and the CLIP that evaluations use.

    diffusion/           diffusion models, and LDM's samplers
    autoencoder.py       KL autoencoders; first_stage.py is the base class of all first stages
    vq.py                VQ autoencoders
    clip_encoder.py      embeds images and texts with a CLIP, helped by clip_images.py and open_clip_folder.py
    concept_encoder.py   loads a concept encoder and encodes photos; concept_encoder_training.py trains it
    optimization.py      optimizers and learning-rate schedules of all models
    initial_weights.py   loads a model's weights once it is constructed
    frozen.py            freezes modules for good
    random_state.py      repeats random numbers
    mini/                training of the bundled model's parts
"""
