"""The loss and its gradients of a port on JAX."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from reference_np.ops import IGNORE


def loss_and_grads(
    logits_of: Callable[..., Any], params: Any, batches: Sequence[Any], z_loss: float
) -> tuple[float, dict[str, Any]]:
    """Return the mean loss over every valid target and its gradients, by the protocol's names.

    logits_of  called with the parameters, tokens, positions and mask; returns logits [B, T, V].
    """
    count = sum(int(np.sum(batch.targets != IGNORE)) for batch in batches)

    def mean(leaves: Any) -> Any:
        total = 0.0
        for tokens, targets, positions, mask in batches:
            logits, valid = logits_of(leaves, tokens, positions, mask), targets != IGNORE
            log_z, at = jax.nn.logsumexp(logits, axis=-1), jnp.where(valid, targets, 0)
            chosen = jnp.take_along_axis(logits, at[..., None], axis=-1)[..., 0]
            total += jnp.sum(jnp.where(valid, log_z - chosen + z_loss * log_z**2, 0))
        return total / count

    leaves = {name: jnp.asarray(value) for name, value in params.items()}
    loss, grads = jax.jit(jax.value_and_grad(mean))(leaves)
    return float(loss), {name: np.array(grad) for name, grad in grads.items()}
