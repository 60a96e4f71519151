"""Tests of llama_torch/rlhf."""
