"""Faster execution of frozen networks on NVIDIA GPUs. Nothing here changes a result beyond rounding.

    cuda_graphs.py   replay the kernels of a network by CUDA graphs, for sampling and for training concepts
    fused.py         replace the layers of a U-Net by versions that use the kernels below
    kernels/         Triton kernels, forward and backward: group norm with SiLU, layer norm of a sum, GEGLU,
                     and the sum at the end of a residual block
    sixteen_bits.py  store the weights of a U-Net in 16 bits

When it applies
    `ldm.models.diffusion.wrapper.DiffusionWrapper.enable_fast_inference` does all of this to a U-Net. Two callers use
    it: `ldm.training.callbacks.AccelerateFrozenUNet`, for training on CUDA with mixed precision and a frozen U-Net,
    and `ldm.inference.PerfusionPipeline`, for sampling on CUDA in 16 bits. While concepts are trained, the frozen text
    encoder is replayed by graphs, too: `ldm.modules.encoders.prompts.PromptEncoder.enable_fast_inference`.

What falls back, each to the plain network
    Other devices, 32 bits        everything
    No Triton or no C compiler    the fused layers; one warning says so
    Layers of other kinds         the fused layers, for residual blocks that are not two-dimensional, that resample, or
                                  that use `use_scale_shift_norm`
    Dropout in the U-Net          the graphs, which would repeat the same dropout mask
    Prompts that are not cached   the graphs, in sampling: such prompts may not come again
    A fifth shape of inputs       the graphs, in training: each shape needs memory of its own
"""
