"""Methods that learn concepts from a few photos each.

    base.py                 what a method is: the parts that each one defines, and the training step that all share
    training_prompts.py     prompts with the words of concepts, and the sizes of images
    distinct_prompts.py     each distinct prompt of a batch encoded once, and those that never change once per run
    cached_latents.py       photos -> latents, masks -> loss weights, sizes, captions: what the loss reads
    placement.py            large models on the device, part by part
    concept_gradients.py    gradients of several concepts in one run, kept apart
    concept_means.py        means of the losses of several concepts
    layer_names.py          cross-attention layers chosen by their names
    concept_names.py        placeholders, super-categories and file names of a run's concepts
    checks.py               checks on params
    initial_words.py        words that start from embedding files
    prediction_check.py     checks on the photos that the base model predicts what its config says
    copy_paste_scenes.py    training scenes in which the subject stands beside something else
    perfusion.py            Perfusion: a word embedding and one value vector per cross-attention layer
    finetuning.py           base class of the methods that Perfusion is compared with
    textual_inversion.py    Textual Inversion: one word
    celeb_basis.py          Celeb Basis: a word in the span of known ones
    prior_preservation.py   base class of the methods that train the U-Net: photos beside images of the super-category
    custom_diffusion.py     Custom Diffusion: W_K and W_V of cross-attention, and a modifier
    dreambooth.py           DreamBooth: the whole U-Net

To add a method, write a class that derives from `PersonalizationMethod` (or from one of the classes above) in a file of
its own, give it `method` and `method_name`, and name it as `model.target` in a config. Nothing else has to know of it.
"""
