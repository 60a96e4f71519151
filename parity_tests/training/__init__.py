"""Tests of llama_torch/training."""
