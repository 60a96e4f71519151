"""The check of an adapter names each slip, and passes over honest ports and other bugs."""

import json
import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest

from reference_np import ops
from reference_np.limits import Limits
from reference_np.mutants import FORWARD
from reference_np.ops import Array

from ..conformance.basic import Finding, check_adapter
from ..conformance.oracle import Oracle
from ..conformance.slips import PROJECTIONS
from ..support.jobs import Job
from ..support.oracle_inputs import transposed
from . import toy_ports

Compute = Callable[..., Array]  # the oracle's logits, of other parameters or tokens if given


class Adapter(Oracle):
    """The oracle behind an adapter: a function of its logits, the parameters and the tokens."""

    def __init__(self, adapt: Callable[[Compute, Mapping[str, Array], Array], Any]) -> None:
        super().__init__()
        self._adapt = adapt

    def logits(self, config, params, tokens, positions, mask):
        def compute(params=params, tokens=tokens):
            return super(Adapter, self).logits(config, params, tokens, positions, mask)

        return self._adapt(compute, params, tokens)


def log_softmax(logits: Array) -> Array:
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def changing(compute: Compute, params: Mapping[str, Array], tokens: Array) -> Array:
    logits = compute()
    params["model.norm.weight"][:] = 1
    return logits


calls: list[int] = []


def with_dropout(compute: Compute, params: Mapping[str, Array], tokens: Array) -> Array:
    calls.append(1)
    return compute() * (1 + len(calls))


SLIPS = {
    "matrices in the layers": lambda f, p, t: f(params=transposed(p, "layers")),
    "attention matrices": lambda f, p, t: f(params=transposed(p, "self_attn")),
    "MLP matrices": lambda f, p, t: f(params=transposed(p, "mlp")),
    "transposed embeddings": lambda f, p, t: f(params=transposed(p, "embed_tokens")),
    **{
        f"transposed matrix {part}:": lambda f, p, t, part=part: f(params=transposed(p, part))
        for part in PROJECTIONS
    },
    "lm_head": lambda f, p, t: f(params=transposed(p, "lm_head")),
    "tokens in reverse order": lambda f, p, t: f(tokens=t[:, ::-1]),
    "positions of the logits are in reverse": lambda f, p, t: f()[:, ::-1],
    "tokens were read as [T, B]": lambda f, p, t: f(tokens=t.T).swapaxes(0, 1),
    "stand at the next one": lambda f, p, t: np.roll(f(), 1, axis=1),
    "rows of the logits are exchanged": lambda f, p, t: f()[::-1],
    "every row has the logits of the first one": lambda f, p, t: f(tokens=t[[0] * len(t)]),
    "joined to one sequence": lambda f, p, t: f(tokens=t.reshape(1, -1)).reshape(*t.shape, -1),
    "every position has the logits of the last one": lambda f, p, t: f()[:, [-1] * t.shape[1]],
    "log-softmax": lambda f, p, t: log_softmax(f()),
    "the result is the probabilities": lambda f, p, t: np.exp(log_softmax(f())),
    "[2, 16], not [2, 5, 16] [B, T, V]: the logits of the last": lambda f, p, t: f()[:, -1],
    "[2, 1, 16], not [2, 5, 16] [B, T, V]: the logits of the last": lambda f, p, t: f()[:, -1:],
    "the batch axis is missing": lambda f, p, t: f()[0],
    "one row alone": lambda f, p, t: f()[:1],
    "batch and positions are exchanged": lambda f, p, t: f().swapaxes(0, 1),
    "vocabulary and positions are exchanged": lambda f, p, t: f().swapaxes(1, 2),
    "batch and positions are one axis": lambda f, p, t: f().reshape(-1, 16),
    "see reference_np/backend.py": lambda f, p, t: f()[:, :3],
    "the parameters are float64 and the logits float32": lambda f, p, t: f().astype(np.float32),
    "of type NoneType": lambda f, p, t: None,
    "dtype int64": lambda f, p, t: f().astype(int),
    "not finite": lambda f, p, t: f() * np.nan,
    "logits raised ZeroDivisionError": lambda f, p, t: 1 / 0,
    "logits raised SystemExit(0), which ends the process, at ": lambda f, p, t: sys.exit(0),
    "logits raised SystemExit('bye'), which ends the process": lambda f, p, t: sys.exit("bye"),
    "changes the arrays that it is given (model.norm.weight)": changing,
    "two equal calls give different logits": with_dropout,
}


@pytest.mark.parametrize("sentence", SLIPS)
def test_each_slip_is_named(sentence: str) -> None:
    found = check_adapter(Adapter(SLIPS[sentence]))
    assert sentence in found[0].sentence
    assert found[0].spoils


def test_a_torch_tensor_is_named() -> None:
    torch = pytest.importorskip("torch")
    (found,) = check_adapter(Adapter(lambda f, p, t: torch.tensor(f())))
    assert "logits is a torch tensor: return a NumPy array" in found.sentence


class TakesOneSizeForAnother(toy_ports.Small):
    """A port that reads a field in place of another."""

    def __init__(self, **fields: str) -> None:
        self.fields = fields

    def logits(self, config: Any, *arguments: Any) -> Any:
        read = {name: getattr(config, other) for name, other in self.fields.items()}
        if read.get("hidden_dim", config.hidden_dim) != config.hidden_dim:
            raise ValueError("operands could not be broadcast together")
        changed = type(config)(**vars(config) | read)
        return super().logits(changed, *arguments)


@pytest.mark.parametrize(("field", "other"), [("hidden_dim", "dim"), ("n_kv_heads", "n_heads")])
def test_a_field_that_is_taken_for_another_is_named(field: str, other: str) -> None:
    (found,) = check_adapter(TakesOneSizeForAnother(**{field: other}))
    assert found.kind == field
    assert f"is config.{field} read?" in found.sentence
    assert found.spoils


def test_no_slip_is_found_in_an_honest_port() -> None:
    ports = (toy_ports.Small, toy_ports.Engine, toy_ports.Float32Epsilon, toy_ports.Float32Angles)
    for port in (*ports, toy_ports.OneTokenEach, toy_ports.SmallWithFixedEpsilon, Oracle):
        assert check_adapter(port()) == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_low_precision_is_no_slip(dtype: str) -> None:
    class Low(Oracle):
        dtypes = (dtype,)

        def logits(self, config, params, *rest):
            wide = {name: value.astype(np.float32) for name, value in params.items()}
            return super().logits(config, wide, *rest)

    assert check_adapter(Low()) == []


@pytest.mark.parametrize(
    "limits",
    [
        Limits(rope_types=("llama3",), tied=(True,), context=16, batch=1),
        Limits(rope_types=("linear",)),
    ],
)
def test_the_check_stays_inside_the_limits(limits: Limits) -> None:
    class Limited(Oracle):
        def logits(self, config, params, tokens, positions, mask):
            assert config.rope_type in limits.rope_types
            assert config.tie_embeddings in limits.tied
            assert len(tokens) <= (limits.batch or 2)
            assert positions is None
            assert mask is None
            return super().logits(config, params, tokens, positions, mask)

    Limited.limits = limits
    assert check_adapter(Limited()) == []


def test_a_bug_of_the_port_is_named_and_left_to_the_suite() -> None:
    found: dict[str, list[Finding]] = {
        mutant.name: check_adapter(Oracle(mutant.apply(ops))) for mutant in FORWARD
    }
    assert not any(one.spoils for each in found.values() for one in each)
    (tiled,) = found["kv_heads_tiled"]
    assert tiled.kind == "n_kv_heads"
    assert "equal to the known bug kv_heads_tiled" in tiled.sentence
    assert "the known bug silu_on_up" in found["silu_on_up"][0].sentence


def test_a_port_without_logits_is_told_so() -> None:
    class Later(Oracle):
        def logits(self, *arguments):
            raise NotImplementedError("later")

    (found,) = check_adapter(Later())
    assert found.sentence.startswith("logits are required, and none were computed")


GREEN_BUT_FOR_THE_ADAPTER = Job(
    lambda folder: (
        *("-m", "llama_parity", "test", "--profile", "quick", "-n", "0"),
        *("parity_tests.suite.toy_oracles:WrongInTheAdaptersCheckAlone", "--report"),
        folder / "report.json",
    )
)


def test_a_finding_about_the_adapter_fails_a_run_without_a_red_check() -> None:
    done = GREEN_BUT_FOR_THE_ADAPTER.done()
    assert done.returncode == 1, done.stdout + done.stderr
    assert "no check failed, but in the adapter's check logits: the logits of the" in done.stdout
    report = json.loads((GREEN_BUT_FOR_THE_ADAPTER.folder / "report.json").read_text())
    assert report["verdict"] == "failed"
