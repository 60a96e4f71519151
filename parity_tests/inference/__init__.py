"""Tests of llama_torch/inference and the commands that generate."""
