"""Judges the Triton kernels by their machine code, on a machine that need not have a GPU."""
