"""Compare the embedding's gradient of a whole micro-batch with the float64 sum of its terms.

Axes: B batch, T position, N positions of all rows (not key/value heads), V vocabulary, D dim.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..model.llama import Llama
from ..model.loss import count_valid
from . import step
from .batch import Batch
from .objective import TokenLoss

COLUMNS = 64  # columns of the gradient compared at a time, in float64


class Terms(NamedTuple):
    """The terms of the embedding's gradient, and the gradient computed from them, on the CPU."""

    tokens: Tensor  # [N]
    d_out: Tensor  # [N, D], gradients of the looked-up rows
    in_head: Tensor | None  # [V, D], a tied head's gradient, added to theirs
    found: Tensor  # [V, D]


@contextmanager
def gradients_aside(model: Llama) -> Iterator[None]:
    """Set every parameter's gradient to None, and restore it at the end."""
    before = {parameter: parameter.grad for parameter in model.parameters()}
    try:
        for parameter in before:
            parameter.grad = None
        yield
    finally:
        for parameter, grad in before.items():
            parameter.grad = grad


def embedding_error(
    model: Llama, batch: Batch, z_loss: float, factor: float
) -> tuple[float, float]:
    """Return the error and bound of the token whose error is the largest share of its bound.

    Both are relative to the size of that token's gradient. Of a float32 sum of n terms the bound
    is ``factor`` times sqrt(n) roundings of their absolute values (tier 2 of the oracle's
    tolerances). Nothing of the model is changed.
    """
    if not count_valid(batch.targets):  # any others will do
        batch = batch._replace(targets=batch.tokens)
    terms = _observe(model, batch, z_loss)
    if terms is None:
        return math.inf, torch.finfo(model.head_weight.dtype).eps / 2
    return _worst(terms, factor)


def _observe(model: Llama, batch: Batch, z_loss: float) -> Terms | None:
    """Run a training step's passes; return the terms, or None if the embedding has no gradient."""
    weight, seen = model.model.embed_tokens.weight, list[tuple[Tensor | None, Tensor]]()

    def passed_back(d_out_BTD: Tensor) -> None:
        # The head's gradient is complete before the decoder's backward pass begins.
        in_head = None if weight.grad is None else weight.grad.clone().cpu()
        seen.append((in_head, d_out_BTD.detach().cpu().flatten(0, 1)))

    def looked_up(_: nn.Module, given: Any, rows_BTD: Tensor) -> None:
        if rows_BTD.requires_grad:
            rows_BTD.register_hook(passed_back)

    hook = model.model.embed_tokens.register_forward_hook(looked_up)
    try:
        with gradients_aside(model):
            _, grads = step.accumulate(model, [batch], TokenLoss(z_loss))
            found = grads.get(weight)
    finally:
        hook.remove()
    if found is None or not seen:
        return None
    in_head, d_out_ND = seen[0]
    return Terms(batch.tokens.cpu().flatten(), d_out_ND, in_head, found.cpu())


def _worst(terms: Terms, factor: float) -> tuple[float, float]:
    """Return the relative error and bound of the token with the largest share of its bound."""
    vocab_size, dim = terms.found.shape
    counts_V = torch.bincount(terms.tokens, minlength=vocab_size)
    unit = torch.finfo(terms.found.dtype).eps / 2
    per_term_V = factor * counts_V.sqrt() * min(unit, torch.finfo(torch.float32).eps / 2)
    squares = torch.zeros(3, vocab_size, dtype=torch.float64)  # of error, bound and size
    for at in range(0, dim, COLUMNS):
        part = slice(at, at + COLUMNS)
        d_out, found = terms.d_out[:, part].double(), terms.found[:, part].double()
        exact = torch.zeros_like(found).index_add_(0, terms.tokens, d_out)
        size = torch.zeros_like(found).index_add_(0, terms.tokens, d_out.abs())
        bound = per_term_V[:, None] * size + unit * exact.abs()
        if terms.in_head is not None:  # the sum of both is rounded once more
            exact += terms.in_head[:, part]
            bound += unit * exact.abs()
        for total, x in zip(squares, (found - exact, bound, exact), strict=True):
            total += x.square().sum(1)
    error, bound, size = squares.sqrt().nan_to_num(math.inf, math.inf)
    share = torch.where(error > 0, error / bound, 0)  # nothing is right where nothing is due
    worst = int(share.argmax())
    if not math.isfinite(share[worst]):
        return math.inf, unit
    if not error[worst]:  # nor anywhere else
        return 0.0, unit
    scale = size[worst] or bound[worst]  # all of it may cancel
    return float(error[worst] / scale), float(bound[worst] / scale)
