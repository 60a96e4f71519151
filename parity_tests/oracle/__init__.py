"""Tests of reference_np: operations, the whole model, gradients and training steps."""
