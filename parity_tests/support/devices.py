"""Marks of tests that run on the CPU and on a GPU."""

import pytest
import torch

no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

on_every_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=no_gpu)])
