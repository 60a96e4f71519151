"""Tests of llama_torch/data."""
