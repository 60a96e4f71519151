"""Triton kernels: decoding of one and of several sequences, and cross-entropy."""
