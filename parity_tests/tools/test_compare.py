"""compare.py: agreement where there is one, the right place and name where there is none."""

import dataclasses
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from llama_torch.checkpoint.hf import load_model, locate, read_tensor
from reference_np.config import LlamaConfig
from reference_np.low_precision import round_to
from reference_np.mutants import FORWARD
from reference_np.naming import activation_axes, parameter_shapes
from reference_np.tolerances import Errors, composed_bound, errors_beside
from reference_np.training_mutants import TRAINING
from tools import compare
from tools.comparison import judging, torch_side, training_step, training_task
from tools.comparison.inputs import make_calls
from tools.comparison.trace_file import Trace, cached

from ..backends.torch_model import save_numpy
from ..conformance.oracle import Oracle
from ..conformance.strategies import cast, random_params
from ..planted.bugs import BUGS
from ..planted.port import Planted
from ..planted.training import PlantedTrainer

CONFIG = LlamaConfig(32, 3, 4, 2, 8, 48, 300, max_seq_len=2048, rope_theta=5e5)
NAMES = list(activation_axes(CONFIG))
ONE_OF_EACH = [n for n in parameter_shapes(CONFIG) if "layers" not in n or "layers.1" in n]
CALLS = 7  # of the default input
# Where a wrong weight must first show.
FIRST_SEEN = {
    "embed_tokens": "embed",
    "input_layernorm": "attn_norm",
    "q_proj": "q",
    "k_proj": "k",
    "v_proj": "v",
    "o_proj": "attn_proj",
    "post_attention_layernorm": "ffn_norm",
    "gate_proj": "gate",
    "up_proj": "up",
    "down_proj": "ffn_proj",
    "lm_head": "logits",
    "model.norm": "norm",
}
# The first activation that an operation of the catalogue makes.
MADE_BY = {
    "apply_rope": "q_rope",
    "rope_tables": "q_rope",
    "next_positions": "q_rope",
    "group_queries": "attn",
    "attention_scores": "attn",
    "masked_softmax": "attn",
    "causal_mask": "attn",
    "extend": "attn",
    "merge_heads": "attn_proj",
    "rms_norm": "attn_norm",
    "swiglu": "ffn",
    "add": "attn_residual",
    "linear": "q",
}
READ_BY = {"weights_unpermuted": "q", "k_permuted_as_q": "k"}  # the other two: the head


def write(path: Path, config: LlamaConfig) -> Path:
    save_numpy(cast(random_params(config, 0), np.float32), path, {"config": config.to_json()})
    return path


@pytest.fixture
def ckpt(tmp_path: Path) -> Path:
    return write(tmp_path / "ckpt.safetensors", CONFIG)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def call(*argv: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = compare.main([str(part) for part in argv])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def report(run: Callable) -> Callable[..., dict[str, Any]]:
    """Run with --json; return the report, its exit code checked against the verdict."""

    def call(*argv: object) -> dict[str, Any]:
        code, out, err = run(*argv, "--json", "-")
        assert code in (0, 1), err
        found = json.loads(out)
        assert found["verdict"]["holds"] == (code == 0)
        return found

    return call


@pytest.fixture
def offer(monkeypatch: pytest.MonkeyPatch) -> Callable:
    """Make an object importable; return its package.module:object."""

    def register(found: Any) -> str:
        name = f"backend_{id(found)}"
        module = ModuleType(name)
        module.it = found
        monkeypatch.setitem(sys.modules, name, module)
        return f"{name}:it"

    return register


def named(found: Mapping[str, Any]) -> list[list[str]]:
    return [[bug["name"] for bug in entry["mutants"]] for entry in found["diagnosis"]]


@pytest.mark.parametrize("against", ["torch", "torch:float64", "torch:bfloat16", "torch:float16"])
def test_an_honest_checkpoint_passes(ckpt: Path, run: Callable, against: str) -> None:
    code, out, err = run(ckpt, "--against", against)
    assert (code, err) == (0, "")
    n = CALLS * (len(NAMES) + ("float64" not in against))  # and the logits' KL
    assert out.splitlines()[-1].startswith(f"PASS: {n} of {n} activations within bounds")
    assert not any(name in out.replace(out.splitlines()[-1], "") for name in NAMES if "." in name)
    everything = run(ckpt, "--against", against, "--all")[1]
    for name in NAMES:
        rows = [line for line in everything.splitlines() if not line.startswith("logits of")]
        assert sum(row.split()[:1] == [name] for row in rows) == CALLS
    assert max(map(len, everything.splitlines()[1:-8])) <= 100


@pytest.mark.parametrize("against", ["hf:float64", "hf", "hf:bfloat16", "transformers"])
def test_hugging_faces_llama_passes(tmp_path: Path, run: Callable, against: str) -> None:
    near = LlamaConfig(32, 3, 4, 2, 8, 48, 300, max_seq_len=64, tie_embeddings=True)
    code, out, err = run(write(tmp_path / "near.safetensors", near), "--against", against)
    assert (code, err) == (0, "")
    assert f"PASS: {CALLS * (len(NAMES) + ('float64' not in against))} of " in out


def test_hugging_faces_float32_angles_are_named(ckpt: Path, report: Callable) -> None:
    """A difference that is really there: position times frequency, multiplied in float32."""
    found = report(ckpt, "--against", "hf")
    assert found["first_divergence"]["name"] == "layers.0.q_rope"
    assert found["calls"][found["first_divergence"]["call"]]["name"] == "position 2,040 on"
    assert named(found) == [["rope_angles_float32"]]
    assert found["unexplained"] == 0


def expected_place(bug: str) -> str:
    mutant = next(mutant for mutant in FORWARD if mutant.name == bug)
    if mutant.operation == "read":
        return READ_BY.get(bug, "logits")
    return MADE_BY[mutant.operation]


def test_every_known_bug_is_planted() -> None:
    assert set(BUGS) == {mutant.name for mutant in FORWARD}


@pytest.mark.parametrize(
    ("bug", "dtype"),
    [(bug, "float64") for bug in sorted(BUGS)]
    + [(mutant.name, "float32") for mutant in FORWARD if mutant.known_by != "value"]
    + [("norm_eps_tenth", "float32"), ("norm_inverted", "float32")],
)
def test_a_planted_bug_is_located_and_named(
    tmp_path: Path, report: Callable, offer: Callable, bug: str, dtype: str
) -> None:
    """The bug written in torch, by somebody else than the catalogue's; nothing else is blamed."""
    size = {"max_seq_len": 2048, "rope_theta": 5e5, "tie_embeddings": bug == "tied_head_random"}
    size |= {"rope_type": "llama3", "rope_factor": 8.0} if "scaling" in bug else {}
    path = write(tmp_path / "x.safetensors", LlamaConfig(32, 2, 4, 2, 8, 48, 60, **size))
    spec = offer(Planted(bug))
    found = report(path, "--against", spec, "--dtype", dtype, "--tokens", 24)
    assert found["first_divergence"]["name"].split(".")[-1] == expected_place(bug)
    assert named(found) == [[bug]]
    assert found["unexplained"] == 0
    wrong = [row for row in found["rows"] if row["status"] == "diverges"]
    assert found["diagnosis"][0]["explains"] == found["diverging"] == len(wrong)
    assert found["diagnosis"][0]["against"] == 0


class Silent:
    """A backend that shows nothing but logits."""

    def __init__(self, inner: Planted) -> None:
        self.inner, self.dtypes = inner, inner.dtypes

    def decode(self, *arguments: Any) -> Any:
        return self.inner.decode(*arguments)

    def logits(self, *arguments: Any) -> Any:
        return self.inner.logits(*arguments)


# A row whose positions are all shifted by the same has the same logits: rotations are relative.
HARMLESS = {"left_padding_in_positions"}
# At the end of a whole model an error has any size for any reason, and nothing is named by it.
BY_VALUE = {mutant.name for mutant in FORWARD if mutant.known_by == "value"}


@pytest.mark.parametrize("bug", sorted(BY_VALUE - HARMLESS))
def test_a_planted_bug_is_named_by_the_logits_alone(
    ckpt: Path, tmp_path: Path, report: Callable, offer: Callable, bug: str
) -> None:
    """From outputs, a bug must be among the few that this input cannot tell apart."""
    if "scaling" in bug:
        scaled = dataclasses.replace(CONFIG, rope_type="llama3", rope_factor=8.0)
        ckpt = write(tmp_path / "scaled.safetensors", scaled)
    argv = (ckpt, "--against", offer(Silent(Planted(bug))), "--dtype", "float64", "--tokens", 8)
    found = report(*argv)
    assert found["verdict"]["expected"] == CALLS
    assert found["first_divergence"]["name"] == "logits"
    assert "the whole model" in found["first_divergence"]["operation"]
    guilty = named(found)
    assert len(guilty) == 1
    assert bug in guilty[0]
    assert len(guilty[0]) <= 3


class Damaged(Planted):
    """The honest copy of other weights."""

    def __init__(self, damage: Callable[[str, np.ndarray], np.ndarray]) -> None:
        super().__init__()
        self.damage = damage

    def traced_decode(self, config: LlamaConfig, params: Any, *rest: Any) -> Any:
        changed = {name: self.damage(name, params[name]) for name in params}
        return super().traced_decode(config, changed, *rest)


def scaled(part: str, factor: float) -> Callable[[str, np.ndarray], np.ndarray]:
    return lambda name, value: value * value.dtype.type(factor) if part in name else value


@pytest.mark.parametrize("part", ["layers.1.self_attn.q_proj", "model.norm", "up_proj", "lm_head"])
@pytest.mark.parametrize(
    ("factor", "shown"), [(1.0001, "all"), (1.003, "all"), (1.003, "logits"), (2.0, "logits")]
)
def test_no_bug_is_named_for_what_is_none(
    ckpt: Path, report: Callable, offer: Callable, part: str, factor: float, shown: str
) -> None:
    """An error as large as some rounding's, where that rounding would touch more."""
    port = Damaged(scaled(part, factor))
    spec = offer(Silent(port) if shown == "logits" else port)
    found = report(ckpt, "--against", spec, "--tokens", 8)
    assert not found["verdict"]["holds"]
    assert found["diagnosis"] == []
    assert found["unexplained"] == found["diverging"] > 0


def test_a_bug_that_changes_nothing_explains_nothing(
    ckpt: Path, report: Callable, offer: Callable
) -> None:
    """An error just beyond its bound is within it of whatever the oracle's float32 makes."""

    def rough(value: np.ndarray) -> np.ndarray:
        return value * (1 + 9e-7 * np.where(np.arange(value.shape[-1]) % 2, 1, -1)).astype("f4")

    found = report(ckpt, "--against", offer(Edited("layers.1.ffn_proj", rough)), "--tokens", 8)
    assert {row["name"] for row in found["rows"] if row["status"] == "diverges"} == {
        "layers.1.ffn_proj"
    }
    assert found["diagnosis"] == []


def test_a_finding_is_tried_on_every_layer(
    tmp_path: Path, report: Callable, offer: Callable
) -> None:
    """One bug in all of six layers, and in the fourth another error that it does not explain."""

    class Mixed(Planted):
        def traced_decode(self, *arguments: Any) -> Any:
            found, cache = super().traced_decode(*arguments)
            return found | {"layers.3.q": found["layers.3.q"] * np.float32(1.1)}, cache

    path = write(tmp_path / "deep.safetensors", LlamaConfig(16, 6, 2, 1, 8, 24, 60))
    found = report(path, "--against", offer(Mixed("silu_on_up")), "--tokens", 8)
    assert named(found) == [["silu_on_up"]]
    assert found["diagnosis"][0]["explains"] == 6 * CALLS
    # The rotation of what q is said to be is wrong as well.
    assert found["unexplained"] == 2 * CALLS
    assert found["diverging"] == 8 * CALLS


class Two(Planted):
    """Two planted bugs at once."""

    def __init__(self, *bugs: str) -> None:
        super().__init__()
        for bug in bugs:
            vars(self.ops).update(BUGS[bug])


PAIRS = [
    ("norm_eps_tenth", "silu_on_up"),  # in different places
    ("rope_interleaved", "rope_theta_ignored"),  # in one activation
    ("scores_unscaled", "mask_forgotten"),
]


@pytest.mark.parametrize("bugs", PAIRS)
def test_two_bugs_at_once(
    ckpt: Path, report: Callable, offer: Callable, bugs: tuple[str, ...]
) -> None:
    argv = ("--against", offer(Two(*bugs)), "--dtype", "float64", "--tokens", 8)
    found = report(ckpt, *argv)
    assert {name for names in named(found) for name in names} == set(bugs)
    assert found["unexplained"] == 0


def test_two_bugs_by_the_logits_alone(ckpt: Path, report: Callable, offer: Callable) -> None:
    planted = Silent(Two("norm_variance", "silu_on_up"))
    argv = ("--against", offer(planted), "--dtype", "float64", "--tokens", 8)
    assert named(report(ckpt, *argv)) == [["norm_variance", "silu_on_up"]]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_a_corrupted_weight_is_found_where_it_is(
    ckpt: Path, report: Callable, name: str, dtype: str
) -> None:
    """One element of one tensor, on the torch side, off by as much as its tensor's size."""
    tensors = load_file(ckpt)
    damaged = tensors[name].copy()
    # Row 32 is the id of a space: a token that the default text holds.
    damaged[(32, 1) if damaged.shape[0] == 300 else (1,) * damaged.ndim] += 1.0
    other = ckpt.with_name("other.safetensors")
    save_numpy(tensors | {name: damaged}, other, {"config": CONFIG.to_json()})
    found = report(ckpt, "--against", other, "--dtype", dtype, "--tokens", 24)
    seen = next(place for part, place in FIRST_SEEN.items() if part in name)
    layer = name.split(".")[2] if ".layers." in name else None
    place = seen if layer is None else f"layers.{layer}.{seen}"
    assert found["first_divergence"]["name"] == place
    assert {row["name"] for row in found["rows"] if row["status"] == "diverges"} == {place}
    assert found["diagnosis"] == []  # no known bug does that
    assert found["unexplained"] == found["diverging"] > 0
    heat = found["heatmap"]
    worst = np.array(heat["error"]).max(axis=0)
    if seen not in ("embed", "attn_norm", "ffn_norm", "norm"):
        assert (worst > 0.01 * worst.max()).sum() == 1  # one output channel


def test_a_baseline_that_overflowed_excuses_nothing() -> None:
    """Not any finite error; beside a run that did not overflow it counts for nothing."""
    exact = np.random.default_rng(0).standard_normal((2, 3, 8))
    over, close = exact.astype(np.float32), exact.astype(np.float32)
    none = composed_bound(Errors(0, 0, 0), "float32")
    for bad in (np.inf, -np.inf, np.nan):
        over[1, 2, 3] = bad
        assert judging.bound(exact, [over], "float32") == none
        both = judging.bound(exact, [over, close], "float32")
        assert both == judging.bound(exact, [close], "float32")
        assert both.rms > none.rms
        allowed = np.full_like(exact, bad)
        error, limit = errors_beside(exact * 1.5, exact, allowed)
        assert error.rms == pytest.approx(0.5)
        assert not error.within(limit)


def test_a_wrong_model_that_overflows_in_the_baseline_fails(
    tmp_path: Path, report: Callable, offer: Callable
) -> None:
    """In float16 these logits are infinite; the other side's are finite, and wrong."""

    class Wide(Planted):
        dtypes = ("float16",)

        def traced_decode(self, config: Any, params: Any, *rest: Any) -> Any:
            wide = {name: params[name].astype(np.float32) for name in params}
            found, cache = super().traced_decode(config, wide, *rest)
            return found | {"logits": found["logits"] * np.float32(1.5)}, cache

    config = LlamaConfig(16, 1, 2, 1, 8, 24, 60)
    params = random_params(config, 0)
    params["lm_head.weight"] *= 1e5
    params = {name: np.clip(value, -6e4, 6e4) for name, value in params.items()}
    save_numpy(cast(params, np.float32), tmp_path / "x.safetensors", {"config": config.to_json()})
    found = report(tmp_path / "x.safetensors", "--against", offer(Wide()), "--tokens", 8)
    rows = [row for row in found["rows"] if row["name"] == "logits"]
    assert {row["status"] for row in rows} == {"diverges"}
    for row in rows:
        bounds = [row[part]["bound"]["rms"] for part in ("inherited", "fresh")]
        assert max(bounds) < 0.1


def test_the_bound_of_attentions_sums_is_attentions_alone(
    tmp_path: Path, report: Callable, offer: Callable
) -> None:
    """Any order of a sum over 500 keys errs by 22 roundings; no other operation may, by 20."""

    class Rough(Planted):
        def traced_decode(self, *arguments: Any) -> Any:
            found, cache = super().traced_decode(*arguments)
            return {name: rough(name, value) for name, value in found.items()}, cache

    def rough(name: str, value: np.ndarray) -> np.ndarray:
        signs = np.random.default_rng([*name.encode()]).choice([-1, 1], value.shape)
        return (value * (1 + 20 * 2.0**-24 * signs)).astype(np.float32)

    config = dataclasses.replace(CONFIG, n_layers=1)
    path = write(tmp_path / "one.safetensors", config)
    argv = ("--against", offer(Rough()), "--tokens", 500, "--steps", 0, "--no-diagnose")
    rows = [row for row in report(path, *argv)["rows"] if row["call"] == 0 and row["fresh"]]
    assert len(rows) == len(activation_axes(config))
    assert {row["name"] for row in rows if row["status"] != "diverges"} <= {"layers.0.attn"}


class Edited(Planted):
    """The honest copy with one activation changed on its way out."""

    def __init__(self, name: str, edit: Callable) -> None:
        super().__init__()
        self.name, self.edit = name, edit

    def traced_decode(self, *arguments: Any) -> Any:
        found, cache = super().traced_decode(*arguments)
        found = dict(found)
        value = self.edit(found.pop(self.name))
        return (found if value is None else found | {self.name: value}), cache


@pytest.mark.parametrize("name", ["embed", *(n for n in NAMES if "s.1." in n), "norm", "logits"])
@pytest.mark.parametrize(
    ("edit", "status"),
    [
        (lambda x: None, "missing"),
        (lambda x: x * np.nan, "not finite"),
        (lambda x: np.full_like(x, np.inf), "not finite"),
        (lambda x: x[:, :-1], "misshapen"),
        (lambda x: x[..., None], "misshapen"),
        (lambda x: x[:0], "misshapen"),
    ],
)
def test_what_cannot_be_compared_fails(
    ckpt: Path, report: Callable, offer: Callable, name: str, edit: Callable, status: str
) -> None:
    argv = (ckpt, "--against", offer(Edited(name, edit)), "--tokens", 4, "--no-diagnose")
    found = report(*argv)
    wrong = {row["name"] for row in found["rows"] if row["status"] not in ("ok", "inherits")}
    assert wrong == ({"logits", "logits.kl"} if name == "logits" else {name})
    assert found["first_divergence"]["name"] == name
    assert {row["status"] for row in found["rows"] if row["name"] == name} == {status}
    n = CALLS * (len(NAMES) + 1)
    lost = CALLS * (1 + (name == "logits"))
    assert (found["verdict"]["compared"], found["verdict"]["expected"]) == (n - lost, n)


def test_a_bug_beyond_a_missing_stream_is_no_crash(
    ckpt: Path, report: Callable, offer: Callable
) -> None:
    class Worse(Edited):
        def __init__(self) -> None:
            super().__init__("layers.0.residual", lambda x: None)
            vars(self.ops).update(BUGS["silu_on_up"])

    found = report(ckpt, "--against", offer(Worse()), "--tokens", 8)
    assert named(found) == [["silu_on_up"]]
    assert found["unexplained"] == 0  # what is missing is made from what came before it


def test_a_trace_without_decoding(ckpt: Path, report: Callable, offer: Callable) -> None:
    class OneCall:
        dtypes = ("float32",)

        def __init__(self, bug: str) -> None:
            self.inner = Planted(bug)

        def logits(self, *arguments: Any) -> Any:
            return self.inner.logits(*arguments)

        def trace(self, *arguments: Any) -> Any:
            return self.inner.trace(*arguments)

    assert report(ckpt, "--against", offer(OneCall("")))["verdict"]["holds"]
    assert named(report(ckpt, "--against", offer(OneCall("silu_on_up")))) == [["silu_on_up"]]


@pytest.mark.parametrize("which", [2, 3, 4])
def test_a_backend_that_spoils_its_inputs_fools_nobody(
    ckpt: Path, report: Callable, offer: Callable, which: int
) -> None:
    class Spoils(Planted):
        def traced_decode(self, *arguments: Any) -> Any:
            if arguments[which] is not None:
                arguments[which][...] = 1
            return super().traced_decode(*arguments)

    assert not report(ckpt, "--against", offer(Spoils()), "--tokens", 8)["verdict"]["holds"]


def test_a_misread_config_is_seen(
    ckpt: Path, report: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each side reads the file for itself; if the oracle is the one to misread it, they part."""
    real = LlamaConfig.from_hf

    def misread(hf: dict[str, Any], source: str = "") -> LlamaConfig:
        return dataclasses.replace(real(hf, source), rope_theta=1e4)

    monkeypatch.setattr(LlamaConfig, "from_hf", misread)
    for against in ("torch", "hf:float64"):
        found = report(ckpt, "--against", against, "--tokens", 8)
        assert found["first_divergence"]["name"] == "layers.0.q_rope"


@pytest.mark.parametrize("zero", ["lm_head", "model.embed", "weight"])
def test_zeros_are_compared(ckpt: Path, run: Callable, zero: str) -> None:
    """Where everything is zero, so is every bound, and every ratio is 0 / 0."""
    tensors = {n: v * (zero not in n) for n, v in load_file(ckpt).items()}
    path = ckpt.with_name("zero.safetensors")
    save_numpy(tensors, path, {"config": CONFIG.to_json()})
    assert run(path, "--tokens", 8, "--grads")[0] == 0
    assert run(path, "--tokens", 8, "--against", ckpt)[0] == 1


def test_nothing_covered_is_not_a_pass(ckpt: Path, run: Callable, offer: Callable) -> None:
    class Refuses:
        dtypes = ("float32",)

        def logits(self, *arguments: Any) -> Any:
            raise NotImplementedError("not today")

    code, out, _ = run(ckpt, "--against", offer(Refuses()))
    assert code == 1
    assert "FAIL: 0 of 0 activations in 0 of 7 calls compared" in out
    assert "not covered: not today" in out


def test_what_a_backend_lacks_is_counted(ckpt: Path, run: Callable, offer: Callable) -> None:
    class OnlyLogits:
        dtypes = ("float32",)

        def logits(self, *arguments: Any) -> Any:
            return Oracle().logits(*arguments)

    code, out, _ = run(ckpt, "--against", offer(OnlyLogits()))
    assert code == 0
    assert "3 of 7 calls offer their logits alone" in out
    assert "4 of 7 calls not covered: decoding is not offered" in out
    assert "PASS: 6 of 6 activations in 3 of 7 calls within bounds" in out  # with each KL


def test_a_backends_own_error_is_one_line(ckpt: Path, run: Callable, offer: Callable) -> None:
    class Broken:
        def logits(self, *arguments: Any) -> Any:
            raise KeyError("oops")

    code, out, err = run(ckpt, "--against", offer(Broken()))
    assert (code, out) == (2, "")
    assert "logits failed on the call '48 tokens': KeyError: 'oops' (" in err
    assert err.count("\n") == 1


def test_nan_on_both_sides_fails(ckpt: Path, run: Callable) -> None:
    tensors = load_file(ckpt)
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = np.nan
    broken = ckpt.with_name("nan.safetensors")
    save_numpy(tensors, broken, {"config": CONFIG.to_json()})
    code, out, _ = run(broken)
    assert code == 1
    assert "first divergence at layers.1.up (48 tokens): the up projection (not finite)" in out


# Traces.


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_the_oracles_trace_passes_its_own_comparison(
    ckpt: Path, run: Callable, tmp_path: Path, dtype: str
) -> None:
    path = tmp_path / "trace.safetensors"
    assert run(ckpt, "--dtype", dtype, "--trace", path, "--steps", 1)[0] == 0
    with safe_open(path, framework="np") as file:
        assert set(json.loads(file.metadata()["axes"])) == {n.split(".")[-1] for n in NAMES}
        assert {f"call.3.{name}" for name in NAMES} <= set(file.keys())
    code, out, _ = run(ckpt, "--against", path)
    assert code == 0
    assert "6 calls" in out
    with safe_open(path, framework="np") as file:  # what it says it was computed in
        logits = file.get_tensor("call.0.logits")
    assert logits.dtype == (np.float64 if dtype == "float64" else np.float32)
    if dtype == "bfloat16":
        assert np.array_equal(logits, round_to(logits, dtype))


def test_an_edited_trace_fails_where_it_was_edited(
    ckpt: Path, run: Callable, tmp_path: Path
) -> None:
    path = tmp_path / "trace.safetensors"
    run(ckpt, "--trace", path)
    with safe_open(path, framework="np") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    step = "call.2.layers.1.attn"
    tensors[step] = tensors[step] * np.float32(1.001)
    tensors["call.0.surprise"] = np.zeros(1, np.float32)
    tensors["call.9.embed"] = np.zeros(1, np.float32)
    save_numpy(tensors, path, metadata)
    code, out, _ = run(ckpt, "--against", path)
    assert code == 1
    assert "first divergence at layers.1.attn (48 tokens, step 1): attention" in out
    assert "Not in the format and ignored: call.0.surprise, call.9.embed" in out
    del tensors[step]
    save_numpy(tensors, path, metadata)
    code, out, _ = run(ckpt, "--against", path)
    assert code == 1
    assert "(missing)" in out


def lying(view: np.ndarray) -> np.ndarray:
    """Return a transposed array as a writer stores it that looks at nothing but its memory."""
    order = np.argsort([-stride for stride in view.strides], stable=True)
    return np.ascontiguousarray(view.transpose(order)).reshape(view.shape)


@pytest.mark.parametrize(
    ("kinds", "axes"),
    [
        (("q",), (0, 2, 1, 3)),  # from [B, H, T, K]
        (("q", "k", "v", "q_rope", "k_rope", "attn"), (0, 2, 1, 3)),
        (("v",), (3, 1, 2, 0)),
        (("attn_norm", "residual", "embed", "norm"), (1, 0, 2)),
        (("logits", "gate"), (2, 1, 0)),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_a_transposed_array_is_named(
    report: Callable, tmp_path: Path, kinds: tuple, axes: tuple, dtype: str
) -> None:
    """And nothing else is: the rest is judged by the numbers that were meant."""
    ckpt = write(tmp_path / "two.safetensors", dataclasses.replace(CONFIG, n_layers=2))
    path = tmp_path / "trace.safetensors"
    report(ckpt, "--against", "torch", "--dtype", dtype, "--trace", path, "--tokens", 5)
    with safe_open(path, framework="np") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    moved = {n: x for n, x in tensors.items() if n.split(".")[-1] in kinds}
    views = {n: np.ascontiguousarray(x.transpose(axes)) for n, x in moved.items()}
    stored = {n: lying(x.transpose(np.argsort(axes))) for n, x in views.items()}
    save_numpy(tensors | stored, path, metadata)
    found = report(ckpt, "--against", path, "--no-diagnose")
    wrong = {f"call.{r['call']}.{r['name']}" for r in found["rows"] if r["status"] != "ok"}
    assert wrong == {name for name in stored if not np.array_equal(stored[name], tensors[name])}
    assert {r["status"] for r in found["rows"]} == {"ok", "in another order"}
    first = found["first_divergence"]["name"]
    assert f"{first} (5 tokens) holds the right numbers in another order" in found["warnings"]
    assert "write contiguous arrays (np.ascontiguousarray first)" in found["warnings"]


def test_what_safetensors_makes_of_a_transposed_array(
    ckpt: Path, run: Callable, tmp_path: Path
) -> None:
    """Release 0.8.0 misorders it, and then that is said; one that does not is as good as any."""
    path = tmp_path / "trace.safetensors"
    run(ckpt, "--trace", path, "--tokens", 5)
    with safe_open(path, framework="np") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    name = "call.0.layers.0.q"
    view = np.ascontiguousarray(tensors[name].swapaxes(1, 2)).swapaxes(1, 2)
    save_file(tensors | {name: view}, path, metadata)
    right = np.array_equal(load_file(path)[name], view)  # by the release that is installed
    code, out, _ = run(ckpt, "--against", path)
    assert (code, "layers.0.q (5 tokens) holds the right numbers in another order: " in out) == (
        (0, False) if right else (1, True)
    )


def test_scrambled_numbers_are_no_other_order(
    ckpt: Path, report: Callable, offer: Callable
) -> None:
    """Only what a transposition makes right again is called so."""
    spec = offer(Edited("layers.1.q", lambda x: x[:, ::-1]))
    found = report(ckpt, "--against", spec, "--tokens", 8, "--no-diagnose")
    assert found["first_divergence"]["name"] == "layers.1.q"
    assert {r["status"] for r in found["rows"] if r["name"] == "layers.1.q"} >= {"diverges"}
    assert "another order" not in found["warnings"]


def test_a_trace_that_is_none_is_refused(ckpt: Path, run: Callable, tmp_path: Path) -> None:
    path = tmp_path / "trace.safetensors"
    run(ckpt, "--trace", path)
    with safe_open(path, framework="np") as file:
        good = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    other = CONFIG.to_json().replace("500000.0", "10000.0")
    for change, message in (
        ({"version": "2"}, "not llama-trace version 1"),
        ({"dtype": "int8"}, "dtype 'int8'"),
        ({"axes": good["axes"].replace("BTHK", "BHTK")}, "axes are not the format's for attn, q,"),
        ({"config": "{"}, "is not JSON"),
        ({"config": other}, "another architecture"),
        ({"calls": "[]"}, "lists no calls"),
        ({"calls": '[{"name": "a"}]'}, "must continue null or an earlier call"),
        ({"calls": '[{"name": "a", "after": 0}]'}, "must continue null or an earlier call"),
        ({"calls": "null"}, "lists no calls"),
        ({"calls": good["calls"][:-1] + ', {"after": null}]'}, "call.7.tokens is missing"),
    ):
        save_numpy(tensors, path, good | change)
        code, out, err = run(ckpt, "--against", path)
        assert (code, out) == (2, "")
        assert message in err
        assert err.count("\n") == 1
    for name, value, message in (
        ("tokens", tensors["call.0.tokens"].astype(np.float32), "stored as F32, not as I64, I32"),
        ("tokens", tensors["call.0.tokens"] + 300, "call 0: token id"),
        ("tokens", tensors["call.0.tokens"][:1], "call 1 continues a call of another batch size"),
        ("positions", tensors["call.0.tokens"][:, 1:], "call 0: positions must be"),
        ("mask", np.zeros((2, 48, 48), np.float32), "stored as F32, not as BOOL, U8"),
    ):
        save_numpy(tensors | {f"call.0.{name}": value}, path, good)
        code, out, err = run(ckpt, "--against", path)
        assert (code, out) == (2, ""), err
        assert message in err
        assert err.count("\n") == 1
    save_numpy(tensors, path, good)
    code, _, err = run(ckpt, "--against", path, "--trace", path)
    assert code == 2
    assert "would overwrite an input" in err
    code, _, err = run(ckpt, "--against", path, "--prompt", "text")
    assert code == 2
    assert "--prompt: a trace is compared on its own tokens" in err


# Any size.


def test_a_streamed_model_computes_as_a_loaded_one(
    ckpt: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And holds no parameter before or after: one module's are read while it runs."""
    real, streamed = torch_side.stream_weights, []
    monkeypatch.setattr(
        torch_side,
        "stream_weights",
        lambda model, *rest: (streamed.append(model), real(model, *rest)),
    )
    config, files = locate(ckpt)
    cpu = torch.device("cpu")
    forward = torch_side._ours(config, lambda n: read_tensor(files[n][0], n, torch.float32), cpu)
    found: dict[str, torch.Tensor] = {}
    call = make_calls(np.arange(6), CONFIG, (6,), 0)[0]
    with torch.inference_mode():
        assert all(p.is_meta for p in streamed[0].parameters())
        forward(call, None, found.__setitem__)
        assert all(p.is_meta for p in streamed[0].parameters())
        expected, _ = load_model(ckpt)(torch.from_numpy(call.tokens))
    assert torch.equal(found["logits"], expected)


@pytest.mark.parametrize("edit", [lambda x: None, lambda x: x * np.nan, lambda x: x[:, :-1]])
def test_a_range_needs_something_to_begin_from(
    ckpt: Path, run: Callable, offer: Callable, edit: Callable
) -> None:
    spec = offer(Edited("layers.0.residual", edit))
    code, _, err = run(ckpt, "--against", spec, "--layers", "1", "--tokens", 4)
    assert code == 2
    assert "--layers 1: layers.0.residual of the call '4 tokens' is missing, misshapen" in err


def test_a_range_of_layers(ckpt: Path, report: Callable, offer: Callable) -> None:
    """Errors before the range are not its own; the head belongs to the last layer."""
    spec = offer(Edited("layers.0.residual", lambda x: x * 1.5))
    assert not report(ckpt, "--against", spec)["verdict"]["holds"]
    found = report(ckpt, "--layers", "1:2")
    assert found["verdict"]["holds"]
    kinds = [name for name in NAMES if name.startswith("layers.1.")]
    assert {row["name"] for row in found["rows"]} == set(kinds)
    assert found["verdict"]["expected"] == CALLS * len(kinds)
    found = report(ckpt, "--layers", "2:")
    assert {row["name"] for row in found["rows"]} >= {"layers.2.q", "norm", "logits"}
    # Only layer 1's first norm sees that the stream it was said to get is not what it got.
    found = report(ckpt, "--against", spec, "--layers", "1")
    wrong = {row["name"] for row in found["rows"] if row["status"] == "diverges"}
    assert wrong == {"layers.1.attn_norm", "layers.1.attn_residual"}


# Training.


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_gradients_and_the_step_agree(ckpt: Path, run: Callable, dtype: str) -> None:
    code, out, _ = run(ckpt, "--grads", "--dtype", dtype, "--tokens", 16)
    assert code == 0
    n = CALLS * (len(NAMES) + (dtype == "float32"))
    n += 1 + 2 + 5 * len(parameter_shapes(CONFIG))
    assert out.splitlines()[-1].startswith(f"PASS: {n} of {n} quantities within bounds")


@pytest.mark.parametrize(
    ("bug", "dtype"),
    [(bug, "float64") for bug in ("", *(mutant.name for mutant in TRAINING))]
    # Where what the bug makes rounds worse than what is right.
    + [(bug, "float32") for bug in ("", "softmax_diagonal", "adam_eps_inside", "clip_each")],
)
def test_a_planted_training_bug_is_named(
    tmp_path: Path, report: Callable, offer: Callable, bug: str, dtype: str
) -> None:
    """Written in torch, under autograd; the forward pass is right."""
    config = LlamaConfig(16, 2, 4, 2, 4, 24, 60, tie_embeddings=bug == "embedding_forgotten")
    path = write(tmp_path / "x.safetensors", config)
    spec = offer(PlantedTrainer(bug))
    argv = (path, "--grads", "--against", spec, "--dtype", dtype, "--tokens", 32)
    found = report(*argv)
    assert [row for row in found["rows"] if row["status"] != "ok"] == []
    assert found["verdict"]["holds"] == (bug == "")
    assert named(found["training"]) == ([[bug]] if bug else [])
    assert found["training"]["unexplained"] == 0


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_wrong_gradient_is_located(
    ckpt: Path, report: Callable, offer: Callable, dtype: str
) -> None:
    """One KV head's gradient halved: no known bug, and only what depends on it is wrong."""

    class Lossy(Oracle):
        def loss_and_grads(self, *arguments: Any) -> Any:
            loss, grads = super().loss_and_grads(*arguments)
            wrong = grads["model.layers.1.self_attn.k_proj.weight"].copy()
            wrong[:8] *= 0.5
            return loss, {**grads, "model.layers.1.self_attn.k_proj.weight": wrong}

    spec = offer(Lossy())
    found = report(ckpt, "--grads", "--dtype", dtype, "--tokens", 16, "--against", spec)["training"]
    wrong = [row["name"] for row in found["rows"] if row["status"] == "diverges"]
    assert wrong == ["grad model.layers.1.self_attn.k_proj.weight"]
    assert found["unexplained"] == 1


@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_a_gradient_that_overflowed_in_the_baseline_excuses_no_step(bad: float) -> None:
    config = LlamaConfig(16, 1, 2, 1, 8, 24, 60)
    params = random_params(config, 0)
    task = training_task.Task(config, training_task.make_batches(np.arange(16)), {}, 0.0)
    made = training_step.gradients(task, params)
    task = task._replace(clips=training_task.clips(made[1]))
    exact = training_step.step_values(task, params, made, trains=True)
    name = "model.layers.0.mlp.up_proj.weight"
    plain = exact | {f"grad {name}": np.full_like(exact[f"grad {name}"], bad)}
    wrong = {n: x * (1.5 if n.endswith(f"step {name}") else 1.0) for n, x in exact.items()}
    steps = {f"{run} step {name}" for run in training_task.RUNS}
    for theirs, expected in ((exact, set()), (wrong, steps)):
        rows = training_step.compare_step(task, "float32", theirs, exact, plain, trains=True)
        assert {row.name for row in rows if row.status != "ok"} == expected


def test_a_missing_gradient_fails(ckpt: Path, run: Callable, offer: Callable) -> None:
    class Forgetful(Oracle):
        def loss_and_grads(self, *arguments: Any) -> Any:
            loss, grads = super().loss_and_grads(*arguments)
            return loss, {n: g for n, g in grads.items() if "layers.1.mlp.up" not in n}

    code, out, _ = run(ckpt, "--grads", "--tokens", 16, "--against", offer(Forgetful()))
    assert code == 1
    assert "first divergence at grad model.layers.1.mlp.up_proj.weight" in out
    assert "(missing)" in out


# Inputs and reports.


def test_calls_are_consistent() -> None:
    calls = make_calls(np.arange(1, 40), CONFIG, (30, 7), 2)
    assert [call.name for call in calls[:4]] == [
        "30 tokens",
        "30 tokens, then 2",
        "30 tokens, step 1",
        "30 tokens, step 2",
    ]
    assert len(calls) == 11
    assert cached(calls, 3) == 33
    for c, call in enumerate(calls):
        if call.mask is not None:
            length = call.tokens.shape[1]
            assert call.mask.shape == (2, length, cached(calls, c) + length)
            assert call.mask[:, np.arange(length), np.arange(-length, 0)].all()  # sees itself
        assert call.positions is None or call.positions.max() < CONFIG.max_seq_len


@pytest.mark.parametrize("ids", [[7], [7, 8], [5, 5, 5, 5], [1, 2, 3] * 9])
def test_rows_differ_whatever_the_ids(ids: list[int]) -> None:
    """With two rows alike, a batch whose rows are mixed up would pass."""
    for call in make_calls(np.array(ids), CONFIG, (len(ids),), 2):
        real = call.tokens if call.mask is None else call.tokens[:, -1:]
        assert len(real) == 1 or (real[0] != real[1]).all()


def test_many_steps(tmp_path: Path, run: Callable) -> None:
    """A chain of calls longer than Python's stack is deep."""
    config = LlamaConfig(8, 1, 2, 1, 4, 12, 60, max_seq_len=4096)
    calls = make_calls(np.arange(3), config, (3,), 1200)
    assert cached(calls, 1201) == 3 + 2 + 1199


def test_what_has_no_room_is_said(tmp_path: Path, run: Callable) -> None:
    config = LlamaConfig(8, 1, 2, 1, 4, 12, 60, max_seq_len=16)
    path = write(tmp_path / "short.safetensors", config)
    assert "No decoding: a context of 16" in run(path, "--steps", 20)[1]
    assert "The prompts are cut to what a context of 16 holds" in run(path, "--tokens", 400)[1]


@pytest.mark.parametrize("length", [1, 2, 3, 200])
@pytest.mark.parametrize("context", [1, 2, 9, 64])
def test_any_length_in_any_context(
    tmp_path: Path, run: Callable, context: int, length: int
) -> None:
    config = LlamaConfig(8, 1, 2, 1, 4, 12, 60, max_seq_len=context)
    path = write(tmp_path / "short.safetensors", config)
    ids = [str(i % 60) for i in range(length)]
    code, out, err = run(path, "--ids", *ids)
    assert (code, err) == (0, ""), out


def test_texts_files_and_ids(tmp_path: Path, run: Callable, report: Callable) -> None:
    config = LlamaConfig(8, 1, 2, 1, 4, 12, 50257, max_seq_len=64, tie_embeddings=True)
    path = write(tmp_path / "gpt2.safetensors", config)
    found = report(path, "--prompt", "Hello world")
    assert found["calls"][0]["tokens"][0] == [15496, 995]
    text = tmp_path / "text.txt"
    text.write_text("Hello world", encoding="utf-8")
    assert report(path, "--file", text)["calls"] == found["calls"]
    assert report(path, "--ids", 15496, 995)["calls"] == found["calls"]
    found = report(path, "--tokens", 5, 9)
    assert {"5 tokens", "9 tokens, step 2"} <= {call["name"] for call in found["calls"]}


def test_the_reports_schema(ckpt: Path, run: Callable, tmp_path: Path, offer: Callable) -> None:
    path, html = tmp_path / "report.json", tmp_path / "report.html"
    spec = offer(Planted("silu_on_up"))
    code, out, _ = run(ckpt, "--against", spec, "--grads", "--json", path, "--html", html)
    assert code == 2  # the planted copy does not train
    code, out, _ = run(ckpt, "--against", spec, "--json", path, "--html", html)
    assert code == 1
    found = json.loads(path.read_text())
    assert found["schema"] == "llama-compare/1"
    assert set(found) == {
        *("schema", "title", "checkpoint", "against", "dtype", "n_layers", "layers", "calls"),
        *("coverage", "verdict", "rows", "first_divergence", "diagnosis", "unexplained"),
        *("diverging", "logits", "heatmap", "training", "warnings"),
    }
    row = found["rows"][0]
    assert set(row) == {"call", "name", "status", "inherited", "fresh", "layer", "kind"}
    assert set(row["fresh"]) == {"rms", "worst", "token", "bound", "share"}
    page = html.read_text()
    assert found["verdict"]["line"].split(";")[0] in page
    assert "silu_on_up" in page
    assert "://" not in page.replace("http://www.w3.org", "")  # it needs nothing from anywhere
    assert found["verdict"]["line"] in out


def test_bad_input_is_one_line(ckpt: Path, run: Callable, tmp_path: Path) -> None:
    other = LlamaConfig(32, 3, 4, 2, 8, 48, 300, rope_theta=1e6)
    save_numpy(load_file(ckpt), tmp_path / "other.safetensors", {"config": other.to_json()})
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(ckpt.read_bytes()[:-1])
    for argv, message in (
        (["nowhere.safetensors"], "nowhere.safetensors: no such file"),
        ([broken], "not a complete safetensors file"),
        ([ckpt, "--against", broken], "not a complete safetensors file"),
        ([ckpt, "--against", tmp_path / "other.safetensors"], "rope_theta 1000000.0 for 500000.0"),
        ([ckpt, "--against", "nothing"], "--against nothing: no such file"),
        ([ckpt, "--against", "no.module:it"], "--against no.module:it: cannot be imported"),
        ([ckpt, "--against", "torch:float64", "--dtype", "float32"], "disagree"),
        ([ckpt, "--against", "torch:bfloat16", "--grads"], "--grads compares in float32"),
        ([ckpt, "--prompt", "text"], "--prompt needs the GPT-2 encoding"),
        ([ckpt, "--ids", "300"], "300 is outside the vocabulary"),
        ([ckpt, "--ids", "1", "--prompt", "a"], "exclude each other"),
        ([ckpt, "--file", "nowhere.txt"], "--file nowhere.txt: cannot be read"),
        ([ckpt, "--tokens", "0"], "--tokens must be positive"),
        ([ckpt, "--steps", "-1"], "--steps must not be negative"),
        ([ckpt, "--layers", "2:9"], "the model has layers 0 to 2"),
        ([ckpt, "--layers", "x"], "give a range like 3:5"),
        ([ckpt, "--tokens", "7", "--grads"], "--grads needs 8 tokens"),
        ([ckpt, "--dtype", "float8"], "float8"),
        ([ckpt, "--trace", tmp_path / "no" / "t.safetensors"], "--trace"),
        ([ckpt, "--json", "."], "--json .: is no file"),
        ([ckpt, "--html", "/dev/null"], "--html /dev/null: is no file"),
        ([ckpt, "--trace", ckpt], "would overwrite an input"),
        ([ckpt, "--json", tmp_path / "a", "--html", tmp_path / "a"], "or another report"),
        ([ckpt, "--against", ""], "no such file"),
        ([], "CKPT"),
    ):
        code, out, err = run(*argv)
        assert (code, out) == (2, ""), argv
        assert message in err
        assert err.count("\n") == 1


def test_traces_are_read_as_they_were_written(ckpt: Path, run: Callable, tmp_path: Path) -> None:
    path = tmp_path / "trace.safetensors"
    run(ckpt, "--trace", path, "--tokens", 9)
    trace = Trace(path)
    calls = make_calls(np.array([b % 300 for b in _text()[:9]]), CONFIG, (9,), 2)
    assert len(trace.calls) == len(calls) == CALLS
    for ours, theirs in zip(calls, trace.calls, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert np.array_equal(a, b) if isinstance(a, np.ndarray) else a == b


def _text() -> bytes:
    from llama_torch.data.documents import documents

    return next(iter(documents((), ""))).encode()
