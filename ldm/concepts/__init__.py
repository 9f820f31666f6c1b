"""Learned concepts: the values, their files, the parameters in training, and prompts that contain them.

What a concept is:
    concept.py                  `Concept`, what Perfusion learned about one subject, and its base `NamedConcept`
    finetuned_concept.py        `FinetunedConcept`, what any other method learned: word vectors and U-Net weights
    placeholders.py             the words that stand for concepts in prompts
    fingerprint.py              identifies the base model that a concept was trained on

Files:
    storage.py                  `load_concepts` and `save_concepts`, for files of any method; start here
    concept_file.py             the file format of Perfusion's concepts; concept_checks.py checks its contents
    duals.py                    what concepts of older files lack: C^-1 i*
    model_spec.py               metadata for people and model browsers; thumbnail.py makes the small image in it
    finetuned_concept_file.py   the file format of other methods' concepts
    file_tensors.py             what both formats share
    embedding_file.py           the files of Textual Inversion's public code, A1111, diffusers and ComfyUI
    image_embedding.py          embeddings within PNG images
    word_export.py              writes the word of a concept for other tools

Several concepts:
    merging.py                  makes concepts usable together: one method, one base model, distinct placeholders
    word_merging.py             combines files of Textual Inversion's public code
    weight_merging.py           merges U-Net weights in closed form (Custom Diffusion)
    settings.py                 replaces bias, temperature and used layers for one run

Training:
    trainable_concept.py        the parameters of a Perfusion concept
    trainable_word.py           the word vectors of other methods
    word_norms.py               norms of word vectors in training
    embedding_manager.py        Textual Inversion as the original LDM configs run it
    embedding_insertion.py      puts learned vectors in the place of tokens

Generation:
    stacking.py                 turns concepts into the `Edit` that cross-attention layers apply
    prompt_encoder.py           encodes prompts under the edit of Perfusion concepts
    finetuned_prompt_encoder.py encodes prompts with the vectors and weights of other methods' concepts
    prompt_weights.py           "(word:1.3)" in prompts, and syntax of other tools that is refused
    prompt_checks.py            errors and warnings about prompts, words and concepts
    word_positions.py           finds the tokens of a word in a prompt
"""
