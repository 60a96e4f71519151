"""Tests of llama_torch/common."""
