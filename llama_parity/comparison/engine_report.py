"""Report how far the log-probabilities of two engines are apart: of training and of generation.

Axes: B batch, T tokens of the call.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from reference_np.ops import IGNORE, Array

from .trace_format import Call


def logprob_entry(
    c: int, call: Call, theirs: Array | None, others: Array | None
) -> dict[str, Any] | None:
    """Return the distance of two engines' log-probabilities [B, T] of a call's targets.

    None where either has none, or none that can be subtracted. "k3" estimates the KL divergence
    of the first engine from the second by ``mean(r - 1 - log r)``, r = p_other / p_their, where
    the tokens were drawn from the first engine; no term is negative (Schulman 2020).
    """
    if call.targets is None or theirs is None or others is None or theirs.shape != others.shape:
        return None
    valid = call.targets != IGNORE
    ours, difference = theirs[valid], (theirs - others)[valid]
    if not difference.size or not (np.isfinite(ours).all() and np.isfinite(difference).all()):
        return None
    row, position = np.argwhere(valid)[np.abs(difference).argmax()].tolist()
    ratio = np.minimum(-difference, 700.0)  # whose exponential is still finite
    return {
        "call": c,
        "name": call.name,
        "tokens": int(difference.size),
        "mean": float(difference.mean()),
        "mean_abs": float(np.abs(difference).mean()),
        "largest": float(np.abs(difference).max()),
        "row": row,
        "position": position,
        "k3": float(np.mean(np.expm1(ratio) - ratio)),
    }


def sentence(entry: Mapping[str, Any], of: str = "") -> str:
    """Return a line of an entry: ``of`` names the engines where it is not the oracle's."""
    return (
        f"log-probabilities of {entry['name']}{of}: {entry['tokens']} tokens differ by "
        f"{entry['mean_abs']:.1e} nats on average, {entry['largest']:.1e} at most (row "
        f"{entry['row']}, position {entry['position']}); k3 estimate of the KL {entry['k3']:.1e}"
    )
