"""Tests of llama_torch/distributed."""
