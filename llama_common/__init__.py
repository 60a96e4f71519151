"""Errors, files, flags and settings shared by llama_torch, llama_parity and the tools."""
