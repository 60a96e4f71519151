"""Tests of llama_torch/checkpoint."""
