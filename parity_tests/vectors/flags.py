"""The notes of the flags: for each known bug its class, its effect and the reports of it."""

from typing import Any

from reference_np.mutants import COMMON_SLIP, DERIVATION_SLIP, FORWARD, Mutant
from reference_np.training_mutants import TRAINING

# What the replaced operation belongs to.
CLASSES = {
    "read": "weights",
    "rms_norm": "normalisation",
    "apply_rope": "rotary embedding",
    "rope_tables": "rotary embedding",
    "next_positions": "positions",
    "causal_mask": "mask",
    "extend": "cache",
    "group_queries": "heads",
    "merge_heads": "heads",
    "attention_scores": "attention",
    "masked_softmax": "attention",
    "swiglu": "feed-forward",
    "add": "residual stream",
    "linear": "precision of products",
    "accumulate": "accumulation",
    "clip": "clipping",
    "adamw": "optimizer",
    "decays": "optimizer",
}


def notes() -> dict[str, dict[str, Any]]:
    """Return the note of every flag, by its name."""
    return {mutant.name: _note(mutant) for mutant in (*FORWARD, *TRAINING)}


def _note(mutant: Mutant) -> dict[str, Any]:
    # The name of an operation of the backward pass ends in _vjp.
    bug_class = CLASSES.get(mutant.operation, "gradients")
    if mutant.known_by == "size":
        bug_class = f"precision: {bug_class}".replace("precision: precision", "precision")
    cited = () if mutant.citation in (COMMON_SLIP, DERIVATION_SLIP) else mutant.citation.split(", ")
    return {"bug_class": bug_class, "effect": mutant.sentence, "reports": list(cited)}
