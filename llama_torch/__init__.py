"""LLaMA 2 in PyTorch: training and inference over standard layers.

Read in this order: model/ (config, llama, masks, rope, kv_cache, loss); training/ (step, loop);
data/; tokenizer/; inference/ (engine, decoding, sampling, eager_step, text_model); kernels/.
"""

from .common.errors import InputError
from .inference.completion import Completion
from .inference.config import SamplingConfig
from .inference.text_model import TextModel, load

__all__ = ["Completion", "InputError", "SamplingConfig", "TextModel", "load"]
