"""Checks of an adapter before the suite: its arrays, and which slip of an adapter it equals.

The model is square at first, every matrix [16, 16], so that a transposed one fits. Its logits are
compared with the oracle's, and where they differ with the oracle's under each slip of SLIPS. Then
one size at a time is given a value of its own.
"""

import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from reference_np.config import LlamaConfig
from reference_np.limits import Limits, limits_of
from reference_np.refusals import is_own_refusal
from reference_np.tolerances import max_relative_error

from .architectures import EPSILONS
from .bounds import resembling
from .calls import Calls, ParityError, as_array, no_exit
from .case_parts import best_dtype, oracle_logits, rounded_and_exact_params
from .description import describe_error
from .handed import Handed, describe_change
from .slips import SLIPS
from .strategies import Array, Case, Params, random_params

WIDTH, ROWS, LENGTH = 16, 2, 5
# Errors relative to the largest logit, far above rounding and declared differences, far below a
# slip's; and by how many times a slip's logits must be nearer than the right ones.
CLOSE = {"float64": 1e-3, "float32": 1e-3}
CLOSE_IN_LOW_PRECISION = 0.1
NEARER = 10.0


@dataclass(frozen=True)
class Finding:
    """One finding about an adapter: its kind, a sentence, and whether it spoils every check."""

    kind: str
    sentence: str
    spoils: bool = True


@dataclass(frozen=True)
class Probe:
    """One call without positions and mask: the arrays given, and the exact parameters."""

    backend: Any
    dtype: str
    config: LlamaConfig
    tokens: Array
    params: Params
    exact: Params

    def call(self) -> tuple[Any, list[str]]:
        """Return the backend's logits as they are, and the names of the arrays that it changed."""
        params, tokens = Handed(self.params), Handed({"tokens": self.tokens})
        inputs = (params.copies, tokens.copies["tokens"], None, None)
        with no_exit("logits"):
            value = self.backend.logits(self.config, *inputs)
        return value, params.changed() + tokens.changed()

    def expected(self) -> Array:
        """Return the oracle's logits [B, T, V]."""
        return oracle_logits(self.exact, self.config, self.tokens)

    @property
    def close(self) -> float:
        """The relative error below which two logits are the same."""
        return CLOSE.get(self.dtype, CLOSE_IN_LOW_PRECISION)

    def agrees(self, found: Array, expected: Array) -> bool:
        """Return whether logits are those expected."""
        return found.shape == expected.shape and max_relative_error(found, expected) < self.close


# Backend's name -> what was found, of those that were checked; for the report.
FINDINGS: dict[str, list[Finding]] = {}


def check_adapter(backend: Any) -> list[Finding]:
    """Return what is wrong with an adapter, empty where nothing; some five short calls."""
    found = _of_the_square(backend)
    return found or list(_of_one_size_each(backend))


# The fields of rotary scaling, by kind.
SCALINGS: Mapping[str, Mapping[str, Any]] = {
    "default": {},
    "linear": {"rope_factor": 2.0},
    "llama3": {"rope_factor": 8.0},
}


def _config(limits: Limits, changed: Mapping[str, int]) -> LlamaConfig:
    """Return the square model's config within limits, with changed sizes."""
    sizes = {
        **{"dim": WIDTH, "hidden_dim": WIDTH, "vocab_size": WIDTH, "n_layers": 2},
        **{"n_heads": 4, "n_kv_heads": 4, "head_dim": WIDTH // 4},
    }
    rope_type, epsilon = limits.rope_types[0], EPSILONS[0]
    return LlamaConfig(
        **sizes | dict(changed),
        norm_eps=float(np.float32(epsilon)) if limits.float32_epsilon else epsilon,
        tie_embeddings=limits.tied[0],
        rope_type=rope_type,
        **SCALINGS[rope_type],
        **({} if limits.context is None else {"max_seq_len": limits.context}),
    )


def _probe(backend: Any, **changed: int) -> Probe:
    limits, dtype = limits_of(backend), best_dtype(backend)
    config = _config(limits, changed)
    rows = ROWS if limits.batch is None else min(ROWS, limits.batch)
    # Every token once, so that no order of them equals another.
    tokens = np.random.default_rng(1).permutation(WIDTH)[: rows * LENGTH].reshape(rows, LENGTH)
    case = Case(config, random_params(config, 7), tokens, None, None)
    low, exact = rounded_and_exact_params(backend, case, dtype)
    return Probe(backend, dtype, config, tokens, low, exact)


# The square model


def _of_the_square(backend: Any) -> list[Finding]:
    try:
        probe = _probe(backend)
        value, changed = probe.call()
        found = as_array("logits", value).copy()
    except ParityError as error:
        return [Finding("arrays", error.sentence)]
    except Exception as error:
        return [_raised(backend, error)]
    expected = probe.expected()
    if found.shape != expected.shape:
        return [_misshapen(probe, found, expected)]
    if not np.isfinite(found).all():
        return [Finding("arrays", "logits are not finite (NaN or infinite)")]
    findings = list(_of_the_arrays(probe, found, changed))
    if probe.agrees(found, expected):
        return findings
    return [*findings, *_slip(probe, found, expected)]


def _raised(backend: Any, error: Exception) -> Finding:
    why = describe_error(error)
    if isinstance(error, NotImplementedError) and is_own_refusal(backend, error):
        return Finding("logits", f"logits are required, and none were computed ({why})")
    at = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in at if frame.filename != __file__] or list(at)
    where = ", ".join(dict.fromkeys(f"{at.filename}:{at.lineno}" for at in (own[0], own[-1])))
    return Finding("logits", f"logits raised {why}, at {where}")


def _of_the_arrays(probe: Probe, found: Array, changed: list[str]) -> Iterator[Finding]:
    """Yield findings about types, and about calls that change their arguments or later calls."""
    if probe.dtype in CLOSE and found.dtype.itemsize < np.dtype(probe.dtype).itemsize:
        yield Finding(
            "dtype",
            f"the parameters are {probe.dtype} and the logits {found.dtype}: compute in "
            f"{probe.dtype}, or leave it out of dtypes",
        )
    if changed:
        yield Finding("arguments", describe_change("logits", changed))
        return
    why = "two equal calls give different logits: dropout, or a cache that is kept"
    try:
        again = as_array("logits", probe.call()[0])
    except Exception as error:
        again, why = None, f"the second of two equal calls raised {describe_error(error)}"
    if again is None or not probe.agrees(again, found):
        yield Finding("repetition", why)


def _misshapen(probe: Probe, found: Array, expected: Array) -> Finding:
    """Return which axes are missing or exchanged."""
    rows, length, vocab = expected.shape
    reasons = {
        (rows, vocab): "the logits of one position alone: return those of all T",
        (rows, 1, vocab): "the logits of one position alone: return those of all T",
        (length, vocab): "the batch axis is missing: compute every row",
        (1, length, vocab): "one row alone: compute all of the batch",
        (length, rows, vocab): "batch and positions are exchanged: transpose the first two axes",
        (rows, vocab, length): "vocabulary and positions are exchanged: transpose the last axes",
        (rows * length, vocab): "batch and positions are one axis: reshape to [B, T, V]",
    }
    why = reasons.get(found.shape, "see reference_np/backend.py")
    last = found.reshape(rows, vocab) if found.size == rows * vocab and rows > 1 else None
    if last is not None and probe.agrees(last, expected[:, -1]):
        why = "the logits of the last position alone: return those of all T"
    shape = f"logits have the shape {list(found.shape)}, not {list(expected.shape)} [B, T, V]"
    return Finding("shape", f"{shape}: {why}")


def _slip(probe: Probe, found: Array, expected: Array) -> list[Finding]:
    """Return the slip with the same logits; where there is none, that they differ, and a bug."""
    honest = max_relative_error(found, expected)
    errors = {}
    for i, (_, _, logits) in enumerate(SLIPS):
        value = logits(probe.exact, probe.config, probe.tokens)
        if not probe.agrees(value, expected):  # a slip that changes something here
            errors[i] = max_relative_error(found, value)
    nearest = min(errors, key=errors.__getitem__)
    if errors[nearest] < min(probe.close, honest / NEARER):
        return [Finding(*SLIPS[nearest][:2])]
    equal = resembling(partial(_run, probe), "logits", found, expected, probe.dtype)
    why = f"; they equal the known bug {equal[0]}" if equal else "; no slip of an adapter has them"
    return [Finding("logits", f"the logits of the simplest model differ{why}", spoils=False)]


# One size at a time


SIZES: tuple[tuple[str, dict[str, int]], ...] = (
    ("hidden_dim", {"hidden_dim": 24}),
    ("n_kv_heads", {"n_kv_heads": 2}),
    ("vocab_size", {"vocab_size": 21}),
    ("n_layers", {"n_layers": 3}),
)


def _of_one_size_each(backend: Any) -> Iterator[Finding]:
    """Yield a finding for each size that is right where it equals the others, and else wrong."""
    for name, changed in SIZES:
        usual = getattr(_config(limits_of(backend), {}), name)
        found = None
        try:
            probe = _probe(backend, **changed)
            inputs = (probe.config, probe.params, probe.tokens, None, None)
            found = Calls(backend).logits(*inputs)
        except Exception as error:
            why = describe_error(error)
        if found is not None and probe.agrees(found, expected := probe.expected()):
            continue
        if found is not None:
            equal = resembling(partial(_run, probe), "logits", found, expected, probe.dtype)
            why = f"equal to the known bug {equal[0]}" if equal else "other logits than the oracle"
        yield Finding(
            name,
            f"right with {name} = {usual} and wrong with {changed[name]} alone changed ({why}): "
            f"is config.{name} read?",
            spoils=found is None,
        )


def _run(probe: Probe, model: Any) -> dict[str, Array]:
    return {"logits": model.logits(probe.config, probe.exact, probe.tokens, None, None)}
