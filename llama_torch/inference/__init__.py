"""Inference: prefill, decode and sample; the Python interface."""
