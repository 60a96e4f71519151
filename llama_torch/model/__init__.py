"""The LLaMA 2 architecture: config, layers, key/value caches, masks and loss."""

from typing import TYPE_CHECKING

from ..common.lazy import lazy_names
from .config import ModelConfig

if TYPE_CHECKING:
    from .llama import Llama

__all__ = ["Llama", "ModelConfig"]

__getattr__, __dir__ = lazy_names(__name__, globals(), {"Llama": ".llama"})  # imports torch
