"""Encoders of text and of other conditions.

    prompts.py             the base class of text encoders: prompts, with or without learned words, to encodings
    clip.py                CLIP's text tower (Stable Diffusion 1.x)
    openclip.py            OpenCLIP's text tower (Stable Diffusion 2.x, XL)
    conditioner.py         several encoders side by side (Stable Diffusion XL); sizes.py encodes sizes
    bert.py                the text encoder of LDM text-to-image
    attribute_binding.py   a text tower that binds attributes to nouns, to train the bundled model
    clip_features.py       CLIP's features of whole texts and of images
    image_embedders.py     image encoders of Stable unCLIP, and the noise on their embeddings
    t5.py                  T5, alone and beside CLIP
    conditions.py          class labels and maps
    vocabulary.py          text towers with packed word tables; tokenizer.py writes CLIP's vocabulary
    modules.py             public path of all encoders
"""
