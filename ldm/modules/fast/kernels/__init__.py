"""Triton kernels for what a frozen U-Net would otherwise pass over memory for again and again."""
