"""Read a checkpoint's parameters into the parts of a model that is being built."""

import math
from pathlib import Path

import torch
from torch import nn

from llama_common.errors import InputError

from ..model.config import ModelConfig
from ..model.shapes import ParameterShapes
from .hf import locate, read_stored, require_kind, require_match


class StoredWeights:
    """A language model's parameters in a directory, in one file or shards, of any float's dtype.

    The constructor raises InputError where they do not fit ``config``, before any is read.
    """

    def __init__(self, path: Path, config: ModelConfig) -> None:
        found, self.files = locate(path)
        if found != config:
            raise InputError(f"{path}: its config.json has changed meanwhile; begin again")
        shapes = {name: where.shape for name, where in self.files.items()}
        require_kind(path, shapes)
        require_match(path, ParameterShapes(config), shapes)

    @torch.no_grad()
    def copy_into(self, module: nn.Module, name: str = "") -> None:
        """Copy the stored parameters into a model, or into its submodule of that name.

        One parameter is read at a time, and rounded to the module's precision. Raises InputError
        for a file that cannot be read and a weight that is not finite.
        """
        for parameter_name, parameter in module.named_parameters(name):
            file = self.files[parameter_name].file
            parameter.copy_(read_stored(file, parameter_name))
            if not all(map(math.isfinite, torch.stack(torch.aminmax(parameter)).tolist())):
                raise InputError(
                    f"{file}: {parameter_name} is not finite in {parameter.dtype}; give another "
                    "--init-from"
                )
