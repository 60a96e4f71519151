"""Correct float32 code passes compare.py, also with weights as training leaves them."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_parity import compare
from llama_parity.comparison import differences
from llama_parity.comparison.inputs import make_calls
from llama_parity.comparison.replay import Replay, RoundedParams
from llama_parity.comparison.trace_file import TraceWriter, write_trace
from reference_np import ops
from reference_np.config import LlamaConfig
from reference_np.mutants import Mutant
from reference_np.tolerances import attention_bound, errors_and_bounds

from .. import false_alarms
from ..backends.torch_model import save_numpy
from ..conformance.architectures import seeds
from ..conformance.strategies import Array
from ..false_alarms import ROUNDING, attention, draw, honest_outputs

CONFIG = LlamaConfig(96, 2, 3, 1, 32, 192, 300, max_seq_len=8192, rope_theta=1e5)


def drawn(seed: int, keys: int) -> tuple[tuple[Array, Array, Array, Array], Array, Array]:
    """Return attention's inputs over some keys, its exact output, and its elements' bounds."""
    q, k, v = draw(np.random.default_rng(seed), keys)
    mask = np.ones((1, q.shape[1], keys), dtype=bool)
    wide = q.astype(np.float64), k.astype(np.float64), v.astype(np.float64), mask
    return (q, k, v, mask), attention(*wide), attention_bound(*wide, "float32")


@given(seed=seeds, keys=st.integers(1, 600))
def test_every_order_of_attentions_sums_is_within_its_bound(seed: int, keys: int) -> None:
    given, exact, allowed = drawn(seed, keys)
    for name, found in honest_outputs(*given).items():
        error, bound = errors_and_bounds(found, exact, allowed)
        assert error.within(bound), f"{name}: {error.share(bound):.3g} of the bound"


@pytest.mark.parametrize("bug", ROUNDING, ids=lambda bug: bug.name)
@given(seed=seeds, keys=st.integers(8, 600))
def test_a_lower_precision_in_attention_is_beyond_its_bound(
    bug: Mutant, seed: int, keys: int
) -> None:
    given, exact, allowed = drawn(seed, keys)
    error, bound = errors_and_bounds(attention(*given, bug.apply(ops)), exact, allowed)
    assert error.share(bound) > 1


@pytest.mark.parametrize("keys", [1, 7, 64])
def test_the_bound_of_attention_does_not_depend_on_how_it_is_cut(
    keys: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A long prompt is bounded some queries at a time; masked keys count for nothing."""
    q, k, v = (x.astype(np.float64) for x in drawn(0, keys)[0][:3])
    mask = np.ones((1, 2, keys), dtype=bool)
    mask[:, 0, keys // 2 + 1 :] = False
    whole = attention_bound(q, k, v, mask, "float32")
    monkeypatch.setattr("reference_np.tolerances.MAX_SCORES", 1)
    assert np.allclose(attention_bound(q, k, v, mask, "float32"), whole, rtol=1e-4, atol=0)
    seen = slice(0, keys // 2 + 1)
    few = attention_bound(q[:, :1], k[:, :, seen], v[:, :, seen], mask[:, :1, seen], "float32")
    assert np.allclose(few, whole[:, :1], rtol=1e-4, atol=0)


@pytest.mark.parametrize("seed", [9, 10, 15, 20])  # false alarms with one baseline
def test_peaked_attention_is_no_false_alarm(seed: int, tmp_path: Path) -> None:
    against = [*false_alarms.KERNELS][seed % len(false_alarms.KERNELS)]
    rng = np.random.default_rng(seed)
    assert false_alarms.whole_run(CONFIG, rng, against, tmp_path) <= 1


@pytest.mark.parametrize("widths", [(64, 11008), (4096, 64)], ids=["hidden", "dim"])
def test_sums_taken_term_by_term_are_no_false_alarm(
    widths: tuple[int, int], tmp_path: Path
) -> None:
    """As the loops of a port in C take them, at the widths of Llama 2 7B."""
    config = LlamaConfig(widths[0], 1, 2, 1, 32, widths[1], 300, max_seq_len=64)
    assert false_alarms.whole_run(config, np.random.default_rng(0), "loops", tmp_path) <= 1


def test_what_rounding_may_do_is_tried_before_anything_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other side is perturbed within rounding: right by itself, beyond inherited bounds."""
    path, trace = tmp_path / "ckpt.safetensors", tmp_path / "trace.safetensors"
    params = false_alarms.trained(CONFIG, np.random.default_rng(0))
    save_numpy(params, path, {"config": CONFIG.to_json()})
    calls = make_calls(np.arange(24), CONFIG, (24,), 1)
    write_trace(trace, CONFIG, calls, "float32", perturbed(path, 2))
    assert compare.main([str(path), "--against", str(trace)]) == 0
    monkeypatch.setattr(differences, "MAX_BASELINES", 1)
    capsys.readouterr()
    assert compare.main([str(path), "--against", str(trace)]) == 1
    assert "every operation is right by itself, but errors add up" in capsys.readouterr().out


def perturbed(path: Path, seed: int) -> Callable[[TraceWriter], None]:
    """Return a function that fills a trace with a perturbed run of the baseline."""

    def fill(writer: TraceWriter) -> None:
        replay = Replay(CONFIG, make_calls(np.arange(24), CONFIG, (24,), 1), weights)
        for stage in range(-1, CONFIG.n_layers + 1):
            for (c, name), value in replay.run(stage).items():
                writer.add(c, name, value)

    weights = RoundedParams(path, "float32", "float32", seed)
    return fill


def test_the_measurement_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert false_alarms.main(["--runs", "2", "--lengths", "64", "700", "--layers", "1"]) == 0
    out = capsys.readouterr().out
    assert "    64 keys: 0 of 1 runs alarm" in out
    assert out.splitlines()[-1].startswith("0 false alarms in 2 runs")


def test_the_measurement_counts_an_alarm(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = dict(false_alarms.KERNELS, flash=lambda q, k, v, mask: 1.01 * k[:, :, : q.shape[2]])
    monkeypatch.setattr(false_alarms, "KERNELS", wrong)
    assert false_alarms.main(["--runs", "1", "--lengths", "64", "--layers", "1"]) == 1
    assert "1 false alarms in 1 runs" in capsys.readouterr().out


@pytest.mark.parametrize("argv", [["--runs", "0"], ["--lengths", "0"], ["--threads", "-1"]])
def test_the_measurement_refuses_what_is_not_positive(
    argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert false_alarms.main(argv) == 2
    assert "must be positive" in capsys.readouterr().err
