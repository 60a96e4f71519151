"""The LLaMA 2 architecture: config, layers, key/value caches, masks and loss."""

from .config import ModelConfig
from .llama import Llama

__all__ = ["Llama", "ModelConfig"]
