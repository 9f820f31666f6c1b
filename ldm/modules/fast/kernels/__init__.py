"""Triton kernels that fuse the memory-bound operations of a frozen U-Net (Tillet et al. 2019, "Triton")."""
