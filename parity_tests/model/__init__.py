"""Tests of llama_torch/model and llama_torch/kernels."""
