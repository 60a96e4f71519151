"""LLaMA 2 in PyTorch: training and inference over standard layers.

Read in this order: model/ (config, llama, masks, rope, kv_cache, loss); training/ (step, loop);
data/; tokenizer/; inference/ (engine, decoding, sampling, eager_step, text_model); kernels/.
"""

import importlib.util

from llama_common.interrupt import end_while_importing, is_starting_command

if is_starting_command(__name__):
    end_while_importing()

from .common.requirement import refuse

if importlib.util.find_spec("torch") is None:
    refuse(is_starting_command(__name__))

from typing import TYPE_CHECKING

from llama_common.errors import InputError

from .common.lazy import lazy_names
from .inference.config import SamplingConfig

if TYPE_CHECKING:
    from .inference.completion import Completion
    from .inference.text_model import TextModel, load

__all__ = ["Completion", "InputError", "SamplingConfig", "TextModel", "load"]

# These import torch, which no command needs to answer --help or a wrong flag.
__getattr__, __dir__ = lazy_names(
    __name__,
    globals(),
    {
        "Completion": ".inference.completion",
        "TextModel": ".inference.text_model",
        "load": ".inference.text_model",
    },
)
