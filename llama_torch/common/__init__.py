"""Devices, processes, state files and tensors, for every other package of llama_torch."""
