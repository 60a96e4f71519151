"""Proof, on random shapes and weights, that llama_torch computes reference_np."""
