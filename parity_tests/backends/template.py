"""Copy this file, make ``logits`` call your implementation, and run the suite on it.

    pytest parity_tests/ --backend your.module:YourLlama

The arguments are described in reference_np.backend.Backend; so are decode, trace,
loss_and_grads and train, which you can add for more coverage.
"""

from typing import Any


class YourLlama:
    """One line about the implementation under test."""

    dtypes = ("float32",)  # what it computes in, most precise first

    def logits(self, config: Any, params: Any, tokens: Any, positions: Any, mask: Any) -> Any:
        """Return the logits [B, T, V]."""
        if positions is not None or mask is not None:
            raise NotImplementedError("only causal masks and consecutive positions")
        raise NotImplementedError("call your implementation here")
