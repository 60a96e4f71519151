"""The model: its config, its layers, its cache and its loss."""

from .config import ModelConfig
from .llama import Llama

__all__ = ["Llama", "ModelConfig"]
