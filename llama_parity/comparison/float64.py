"""Run a PyTorch model in float64 where its code casts to float32."""

from typing import Any

import torch


class LiftFloat32(torch.overrides.TorchFunctionMode):
    """Replaces every cast to float32 by one to float64.

    transformers' Llama and other ports compute norms, angles and softmax in float32 whatever the
    model's dtype is. That would limit a comparison to some 1e-7, too coarse to see a wrong epsilon.
    """

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.view:  # no cast: files are read by it
            return func(*args, **kwargs)
        if func is torch.Tensor.float:
            return args[0].to(torch.float64)
        lift = {torch.float32: torch.float64}
        args = tuple(lift.get(a, a) if isinstance(a, torch.dtype) else a for a in args)
        kwargs = {k: lift.get(v, v) if isinstance(v, torch.dtype) else v for k, v in kwargs.items()}
        return func(*args, **kwargs)
