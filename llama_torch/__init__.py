"""LLaMA 2 in PyTorch: training and inference over standard layers.

Read in this order: config, model, cache, loss, step, optim, documents, shards, order, data,
packing, train; then sampling, batch, decoding (numpy_step, kernels, kernel_step, batch_kernels,
batch_step), quantize, speculative, text, chat_template, text_model, evaluate.
"""

from .common.errors import InputError
from .inference.config import SamplingConfig
from .inference.text_model import Completion, TextModel, load

__all__ = ["Completion", "InputError", "SamplingConfig", "TextModel", "load"]
