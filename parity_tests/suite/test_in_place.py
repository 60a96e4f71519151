"""Ports that write to what they are given: no bug of theirs passes for it, and it is named."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest

from reference_np.config import LlamaConfig
from reference_np.grad import Batch
from reference_np.ops import Array
from reference_np.optim import Hyperparameters

from ..conformance.basic import check_adapter
from ..conformance.calls import Calls, ParityError
from ..conformance.case_parts import rounded_and_exact_params
from ..conformance.oracle import Oracle
from ..conformance.strategies import Case, random_params
from ..support.suite_runs import suite

PORTS = "parity_tests.suite.toy_in_place:"
# A port with a bug, the tests that fail on it, and words of their reports.
BUGS = {
    "TiledHeads": ("causal_logits", "the known bug kv_heads_tiled"),
    "DecodingOneLate": ("chunked_decoding engine", "the known bug positions_one_more"),
    "KeysOfTheFirstHead": ("loss_and_grads", "the known bug keys_from_first_head"),
    "DecayOnNorms": ("training", "the known bug decay_on_norms"),
    "TiledHeadsAndDeclaredAngles": ("causal_logits", "the known bug kv_heads_tiled"),
    "ConfigRewritten": ("directory", "logits: "),
}
HONEST = {
    "Overwriting": (
        "causal_logits chunked_decoding engine loss_and_grads training",
        "changes the arrays that it is given (model.embed_tokens.weight and ",
    ),
    "QueriesScaled": (
        "causal_logits chunked_decoding",
        "changes the arrays that it is given (model.layers.0.self_attn.q_proj.weight",
    ),
    "BufferKept": (
        "reused_cache",
        "decode changes what decode returned before: return an array of its own",
    ),
}
CHOSEN = [
    f"{name} and test_{test}"
    for name, (tests, _) in (BUGS | HONEST).items()
    for test in tests.split()
]
RED = suite(
    "parity_tests/conformance",
    *("-k", " or ".join(CHOSEN), "--hypothesis-profile", "unshrunk"),
    *(f"--backend={PORTS}{name}" for name in (*BUGS, *HONEST)),
)


def reports(name: str, test: str) -> list[str]:
    """Return the reports of the failures of a port in a test."""
    title = rf"^_+ test_{test}\[{re.escape(PORTS + name)}(?:-\d+)?\] _+\n"
    return re.findall(title + r"(.*?)(?=\n[_=])", RED.done().stdout, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("name", BUGS)
def test_a_bug_of_a_port_that_overwrites_what_it_is_given_is_red(name: str) -> None:
    tests, words = BUGS[name]
    for test in tests.split():
        found = reports(name, test)
        assert found, RED.done().stdout
        assert all("times its tolerance" in report and words in report for report in found)


@pytest.mark.parametrize("name", HONEST)
def test_overwriting_is_a_failure_of_its_own(name: str) -> None:
    tests, words = HONEST[name]
    for test in tests.split():
        found = reports(name, test)
        assert found, RED.done().stdout
        assert all(words in report.partition("\n")[0] for report in found)


def test_a_loader_may_write_to_its_directory() -> None:
    assert "from_directory changes" not in RED.done().stdout


CONFIG = LlamaConfig(4, 1, 2, 1, 2, 6, 10)
TOKENS = np.arange(6).reshape(2, 3)
CALL = (TOKENS, TOKENS + 1, np.ones((2, 3, 3), bool))
BATCH = Batch(TOKENS, TOKENS + 1, *CALL[1:])
ROWS = [TOKENS[0], TOKENS[1]]
HYPER = Hyperparameters()


def zeroed(value: Any) -> None:
    value[...] = 0


# A call, and how a port changes one of its arguments after params.
CHANGES: dict[str, tuple[str, tuple[Any, ...], Callable[..., Any]]] = {
    "tokens": ("logits", CALL, lambda *a: zeroed(a[0])),
    "positions": ("decode", (*CALL, None), lambda *a: zeroed(a[1])),
    "mask": ("traced_decode", (*CALL, None), lambda *a: zeroed(a[2])),
    "rows[1]": ("start", (ROWS,), lambda *a: zeroed(a[0][1])),
    "batches[0].targets": ("loss_and_grads", ([BATCH], 0.0), lambda *a: zeroed(a[0][0].targets)),
    "batches[0].mask": ("train", ([BATCH], HYPER, 1), lambda *a: zeroed(a[0][0].mask)),
    "batches[0].positions": ("train", ([BATCH], HYPER, 1), lambda *a: a[0].pop()[2].sort(0)),
}


class Changing(Oracle):
    """The oracle, which then changes what it was given by a function of all arguments."""

    def __init__(self, method: str, change: Callable[..., Any]) -> None:
        super().__init__()
        honest = getattr(self, method)

        def call(config: Any, params: Any, *rest: Any) -> Any:
            # As another array, lest the oracle's result be of what is changed.
            result = honest(config, {n: v.copy() for n, v in params.items()}, *rest)
            change(params, *rest)
            return result

        setattr(self, method, call)


@pytest.mark.parametrize("name", CHANGES)
def test_each_argument_is_a_copy_and_named(name: str) -> None:
    method, given, change = CHANGES[name]
    if name == "batches[0].positions":  # reversed, so that to sort them changes them
        given = ([BATCH._replace(positions=TOKENS[::-1].copy())], *given[1:])
    before = repr(given)
    calls = Calls(Changing(method, lambda params, *rest: change(*rest)))
    getattr(calls, method)(CONFIG, random_params(CONFIG, 0), *given)
    assert calls.overwritten == f"{method} changes the arrays that it is given ({name}): copy them"
    assert repr(given) == before


def added(params: dict[str, Array]) -> None:
    params["model.rotary.inv_freq"] = TOKENS


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("model.norm.weight", lambda params: params.pop("model.norm.weight")),
        ("lm_head.weight", lambda params: params["lm_head.weight"].resize(40)),
        ("model.rotary.inv_freq", added),
    ],
)
def test_parameters_that_are_removed_reshaped_or_added_are_named(name: str, change: Any) -> None:
    params = random_params(CONFIG, 0)
    names = list(params)
    calls = Calls(Changing("logits", lambda given, *_: change(given)))
    first, second = (calls.logits(CONFIG, params, TOKENS, None, None) for _ in range(2))
    assert f"({name})" in calls.overwritten
    assert np.array_equal(first, second)
    assert list(params) == names


def test_a_change_by_append_is_named() -> None:
    class Late(Oracle):
        def append(self, tokens: Array) -> Array:
            logits = super().append(tokens)
            self._running[1]["model.norm.weight"] *= 2
            return logits

    calls = Calls(Late())
    calls.start(CONFIG, random_params(CONFIG, 0), ROWS)
    calls.append(TOKENS[:, :1])
    assert calls.overwritten.startswith("append changes the arrays that it is given (model.norm.")


def test_the_parameters_of_a_scenario_are_one_mapping() -> None:
    """A backend may keep its model for as long as it is given the same parameters."""
    seen = []

    class Keeping(Oracle):
        def logits(self, config: Any, params: Any, *inputs: Any) -> Array:
            seen.append(params)
            return super().logits(config, params, *inputs)

    params, calls = random_params(CONFIG, 0), Calls(Keeping())
    for _ in range(2):
        calls.logits(CONFIG, params, TOKENS, None, None)
    assert seen[0] is seen[1]
    assert seen[0] is not params
    assert not calls.overwritten


class Quantising(Oracle):
    """The oracle that says with which weights it computes."""

    def __init__(self, effective: Callable[[Mapping[str, Array]], Any]) -> None:
        super().__init__()
        self._effective = effective

    def effective_params(self, config: Any, params: Mapping[str, Array]) -> Any:
        return self._effective(params)


CASE = Case(CONFIG, random_params(CONFIG, 0), TOKENS, None, None)


def test_effective_params_change_no_weight_of_ours() -> None:
    kept = []

    def halves(params: Mapping[str, Array]) -> Mapping[str, Array]:
        for value in params.values():
            np.round(value, 1, out=value)
        kept.append(params)
        return params

    low, exact = rounded_and_exact_params(Quantising(halves), CASE, "float64")
    name = "lm_head.weight"
    assert np.array_equal(low[name], CASE.params[name])
    assert np.array_equal(exact[name], np.round(low[name], 1))
    kept[0][name][...] = 0
    assert exact[name].any()


@pytest.mark.parametrize(
    ("effective", "message"),
    [
        (lambda params: {**params, "lm_head.weight": params["lm_head.weight"].T}, "has the shape"),
        (lambda params: {"model.norm.weight": params["model.norm.weight"]}, "is missing"),
        (
            lambda params: {n: v[::-1] for n, v in params.items()},
            "effective_params returns another model.embed_tokens.weight than the one given, off",
        ),
    ],
)
def test_effective_params_are_the_weights_given(effective: Any, message: str) -> None:
    port = Quantising(effective)
    with pytest.raises(ParityError, match=message):
        rounded_and_exact_params(port, CASE, "float64")
    assert check_adapter(port)[0].kind == "arrays"


def test_one_bit_is_enough_for_effective_params() -> None:
    def signs(params: Mapping[str, Array]) -> Mapping[str, Array]:
        return {n: np.sign(v) * np.abs(v).mean() if v.ndim == 2 else v for n, v in params.items()}

    rounded_and_exact_params(Quantising(signs), CASE, "float64")
