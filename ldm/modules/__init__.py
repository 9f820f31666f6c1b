"""Building blocks of the models, and the edit that is Perfusion.

    rank_one.py            the equations of the edit, one function each; start here
    edit.py                the concepts that edit a batch of prompts
    context.py             carries encoded prompts and their edit to the cross-attention layers
    attention.py           attention, and the one place where the edit enters it; attention_maps.py records maps
    covariance.py          estimates and caches the covariance C of a text encoder's outputs
    concept_encoder.py     predicts concepts from photos; it reads subject_features.py and noun_encodings.py
    isolated_sum.py        the sum over concepts in training
    encoders/              text encoders and encoders of other conditions; x_transformer.py belongs to one of them
    diffusionmodules/      the U-Net, and the encoder and decoder of first stages
    distributions/         the posterior of KL autoencoders
    losses/                losses of first stages, and that of the concept encoder
    segmentation.py        masks of subjects by a CLIPSeg; residual_segmenter.py is the bundled model's segmenter
    ema.py                 averages of weights
    fast/                  faster execution on NVIDIA GPUs
    embedding_manager.py   public path of `EmbeddingManager`
"""
