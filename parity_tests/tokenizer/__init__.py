"""Tests of llama_torch/tokenizer."""
