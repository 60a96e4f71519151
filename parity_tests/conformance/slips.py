"""The slips of an adapter, each with the logits that the oracle has under it."""

from collections.abc import Callable

import numpy as np

from reference_np.config import LlamaConfig

from .case_parts import oracle_logits
from .strategies import Array, Params

Logits = Callable[[Params, LlamaConfig, Array], Array]  # of parameters, config and tokens [B, T]


PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def _log_softmax(logits: Array) -> Array:
    return logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)


def _transposed(names: Callable[[str], bool], params: Params) -> Params:
    return {n: v.T if v.ndim == 2 and names(n) else v for n, v in params.items()}


def _of_all(name: str) -> bool:
    return "embed_tokens" not in name


def _of_layers(name: str) -> bool:
    return "layers" in name


def _of_part(part: str) -> Callable[[str], bool]:
    return lambda name: part in name


def _with_transposed(names: Callable[[str], bool]) -> Logits:
    return lambda params, config, tokens: oracle_logits(_transposed(names, params), config, tokens)


def _flattened(params: Params, config: LlamaConfig, tokens: Array) -> Array:
    logits = oracle_logits(params, config, tokens.reshape(1, -1))
    return logits.reshape(*tokens.shape, -1)


def _shifted(params: Params, config: LlamaConfig, tokens: Array) -> Array:
    return np.roll(oracle_logits(params, config, tokens), 1, axis=1)


# Kind, the sentence, and the oracle's logits under the slip.
SLIPS: tuple[tuple[str, str, Logits], ...] = (
    *(
        (
            "matrices",
            f"the logits are those of transposed {which}: parameters are [out, in], y = x W^T",
            _with_transposed(names),
        )
        for which, names in (
            ("matrices", _of_all),
            ("matrices in the layers", _of_layers),
            ("attention matrices", lambda name: "self_attn" in name),
            ("MLP matrices", lambda name: "mlp" in name),
            ("matrices q_proj and k_proj", lambda name: "q_proj" in name or "k_proj" in name),
            *((f"matrix {part}", _of_part(part)) for part in PROJECTIONS),
            ("embeddings", lambda name: "embed_tokens" in name),
            ("output matrix (lm_head)", lambda name: "lm_head" in name),
        )
    ),
    (
        "token order",
        "the logits are those of the tokens in reverse order: tokens are [B, T], the first first",
        lambda params, config, tokens: oracle_logits(params, config, tokens[:, ::-1]),
    ),
    (
        "token order",
        "the positions of the logits are in reverse order: return [B, T, V] in the tokens' order",
        lambda params, config, tokens: oracle_logits(params, config, tokens)[:, ::-1],
    ),
    (
        "token order",
        "tokens were read as [T, B]: rows and positions are exchanged; tokens are [B, T]",
        lambda params, config, tokens: oracle_logits(params, config, tokens.T).swapaxes(0, 1),
    ),
    (
        "token order",
        "the logits of each position stand at the next one: return them unshifted",
        _shifted,
    ),
    (
        "row order",
        "the rows of the logits are exchanged: return them in the order of the tokens' rows",
        lambda params, config, tokens: oracle_logits(params, config, tokens)[::-1],
    ),
    (
        "batch",
        "every row has the logits of the first one: compute every row of the batch",
        lambda params, config, tokens: oracle_logits(params, config, tokens[[0] * len(tokens)]),
    ),
    (
        "batch",
        "the rows were joined to one sequence: a row must not attend to another",
        _flattened,
    ),
    (
        "positions",
        "every position has the logits of the last one: return those of all T",
        lambda params, config, tokens: np.repeat(
            oracle_logits(params, config, tokens)[:, -1:], tokens.shape[1], axis=1
        ),
    ),
    (
        "log-softmax",
        "the result is the logits' log-softmax: return the logits, before any normalisation",
        lambda params, config, tokens: _log_softmax(oracle_logits(params, config, tokens)),
    ),
    (
        "softmax",
        "the result is the probabilities: return the logits, before the softmax",
        lambda params, config, tokens: np.exp(_log_softmax(oracle_logits(params, config, tokens))),
    ),
)
