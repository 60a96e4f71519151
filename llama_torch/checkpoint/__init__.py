"""Checkpoints: Hugging Face directories, and the state that training continues from."""
