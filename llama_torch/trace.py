"""Every named activation of a forward pass, as NumPy arrays."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .model import Llama


@torch.inference_mode()
def traced_activations(
    model: Llama, tokens_BT: NDArray[np.integer[Any]]
) -> dict[str, NDArray[Any]]:
    """Run ``tokens_BT`` through the model; return name -> array for each activation.

    Half-precision activations are widened to float32, which NumPy knows; that is exact.
    """
    found: dict[str, NDArray[Any]] = {}

    def note(name: str, value: Tensor) -> None:
        wide = value if value.dtype == torch.float64 else value.float()
        found[name] = wide.cpu().numpy()

    tokens = torch.from_numpy(np.ascontiguousarray(tokens_BT)).to(model.head_weight.device)
    model(tokens, trace=note)
    return found
