"""compare.py: backends are called inside their declared limits; bad names and results are told."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llama_parity import random_checkpoint
from llama_parity.comparison.inputs import make_calls
from llama_parity.comparison.within_limits import exceeded_limit
from reference_np.config import LlamaConfig
from reference_np.limits import Limits
from reference_np.ops import rope_frequencies

from ..planted.port import Planted
from ..plugins.advice import comparison_commands
from ..suite.toy_ports import Engine, Small, SmallWithTiledHeads
from .comparing import CONFIG, QUICK, write

DERIVED = dataclasses.replace(CONFIG, head_dim=CONFIG.dim // CONFIG.n_heads)


class Strict(Planted):
    """The planted port; it fails on a call outside its limits."""

    def __init__(self, limits: Limits) -> None:
        super().__init__()
        self.limits = limits

    def traced_decode(self, *arguments: Any) -> Any:
        config, _, tokens, positions, mask = arguments[:5]
        limits = self.limits
        assert limits.batch is None or len(tokens) <= limits.batch
        assert limits.masks != "causal" or mask is None
        assert limits.positions != "consecutive" or positions is None
        assert limits.cache != "none" or len(arguments) == 5 or arguments[5] is None
        if limits.masks == "right padding" and mask is not None:
            assert mask[:, -1, 0].all()
        if limits.appended == "one token" and len(arguments) > 5 and arguments[5] is not None:
            assert tokens.shape[1] == 1
        if limits.context is not None:
            assert config.max_seq_len <= limits.context
            assert positions is None or positions.max() < limits.context
        return super().traced_decode(*arguments)


@pytest.mark.parametrize(
    ("limits", "left_out"),
    [
        (Limits(masks="causal"), {"padded": "masks = 'causal'"}),
        (Limits(masks="left padding"), {}),
        (Limits(masks="left padding", positions="shifted"), {}),
        (
            Limits(masks="left padding", positions="consecutive"),
            {"position": "positions = 'consecutive'"},
        ),
        (Limits(masks="right padding"), {}),
        (
            Limits(masks="right padding", positions="shifted"),
            {"padded, step 1": "positions = 'shifted'"},
        ),
        (Limits(batch=1), {"padded": "batch = 1"}),
        (Limits(cache="none"), {"48 tokens, ": "cache = 'none'", "padded, s": "cache = 'none'"}),
        (Limits(cache="in place"), {}),
        (Limits(appended="one token"), {}),
        (Limits(context=64), {}),
    ],
    ids=lambda value: (
        " ".join(map(str, value.declared().items())) if isinstance(value, Limits) else ""
    ),
)
def test_calls_outside_a_limit_are_listed_and_not_made(
    ckpt: Path, report: Callable, offer: Callable, limits: Limits, left_out: dict[str, str]
) -> None:
    found = report(ckpt, "--against", offer(Strict(limits)))
    assert found["verdict"]["holds"], found["verdict"]["line"]
    names = [call["name"] for call in found["calls"]]
    expected = {
        name: next(
            (
                f"not covered, by limit: {limit}"
                for start, limit in left_out.items()
                if name.startswith(start)
            ),
            "activations",
        )
        for name in names
    }
    assert dict(zip(names, found["coverage"], strict=True)) == expected


def test_the_calls_of_a_port_without_limits_are_the_seven() -> None:
    calls = make_calls(np.arange(1, 40), CONFIG, (30,), 2)
    assert [exceeded_limit(Limits(), call) for call in calls] == [""] * 7


@pytest.mark.parametrize("port", [Small(), Engine()])
def test_ports_that_can_do_little_pass(
    tmp_path: Path, run: Callable, offer: Callable, port: Any
) -> None:
    path = write(tmp_path / "derived.safetensors", DERIVED)
    code, out, err = run(path, "--against", offer(port), *QUICK)
    assert (code, err) == (0, ""), out
    assert "not covered, by limit: masks = 'causal' (padded" in out


@pytest.mark.parametrize(
    ("limits", "config", "message"),
    [
        (Limits(head_dim="dim / n_heads"), {"head_dim": 16}, "head_dim = 'dim / n_heads', not 16"),
        (Limits(rope_types=("llama3",)), {}, "rope_types = ('llama3',), without 'default'"),
        (Limits(tied=(True,)), {}, "tied = (True,), without False"),
    ],
)
def test_a_checkpoint_outside_the_limits_is_refused(
    tmp_path: Path, run: Callable, offer: Callable, limits: Limits, config: dict, message: str
) -> None:
    path = write(tmp_path / "x.safetensors", dataclasses.replace(CONFIG, **config))
    code, out, err = run(path, "--against", offer(Strict(limits)))
    assert (code, out) == (2, "")
    assert f"it declares the limit {message}" in err
    assert "python -m llama_parity.random_checkpoint DIR --shape tiny" in err
    assert err.count("\n") == 1


def test_a_refused_prompt_is_no_lack_of_decoding(
    ckpt: Path, run: Callable, offer: Callable
) -> None:
    class Refuses(Planted):
        def traced_decode(self, *arguments: Any) -> Any:
            if arguments[4] is not None:
                raise NotImplementedError("no masks")
            return super().traced_decode(*arguments)

    code, out, _ = run(ckpt, "--against", offer(Refuses()))
    assert code == 0
    assert "1 of 7 calls not covered: no masks (padded)" in out
    assert "1 of 7 calls not covered: the call that it continues is not (padded, step 1)" in out
    assert "decoding is not offered" not in out


def test_a_librarys_refusal_is_a_failure(ckpt: Path, run: Callable, offer: Callable) -> None:
    class Deep:
        def logits(self, *arguments: Any) -> Any:
            from unittest.mock import Mock

            return Mock(side_effect=NotImplementedError("deep"))()

    code, out, err = run(ckpt, "--against", offer(Deep()))
    assert (code, out) == (2, "")
    assert "NotImplementedError: deep" in err
    assert "raise NotImplementedError in the backend's own file" in err


class TiledHeads(SmallWithTiledHeads):
    """Key heads repeated in the wrong order, in a port of tied llama3 models alone."""

    limits = dataclasses.replace(Small.limits, rope_types=("llama3",), tied=(True,))

    def frequencies(self, config: Any) -> Any:
        return rope_frequencies(config)


def test_the_commands_that_a_failing_suite_prints_name_the_bug(
    run: Callable, offer: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    spec = offer(TiledHeads())
    commands = [line.split() for line in comparison_commands(spec, ["test_logits"])[-2:]]
    assert [command[:3] for command in commands] == [
        ["python", "-m", "llama_parity.random_checkpoint"],
        ["python", "-m", "llama_parity.compare"],
    ]
    assert random_checkpoint.main(commands[0][3:]) == 0
    code, out, err = run(*commands[1][3:], *QUICK)
    assert (code, err) == (1, "")
    assert "kv_heads_tiled" in out


PORTS = """
class Config: ...
class Llama:
    def logits(self, *arguments): ...
class Other(Llama): ...
"""


def test_a_python_file_is_no_checkpoint(
    ckpt: Path, run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "port.py").write_text(PORTS)
    (tmp_path / "empty.py").write_text("x = (")
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "port.py").write_text(PORTS)
    for spec, message in (
        ("port.py", "is Python source: give --against port.py:Llama or --against port.py:Other"),
        ("port", "port.py is Python source: give --against port:Llama or --against port:Other"),
        ("inner/port.py", "give --against inner/port.py:Llama or"),
        ("inner.port", "give --against inner.port:Llama or"),
        ("empty.py", "empty.py is Python source: give --against empty.py:ClassName"),
    ):
        code, out, err = run(ckpt, "--against", spec)
        assert (code, out) == (2, "")
        assert message in err
        assert err.count("\n") == 1
    monkeypatch.chdir(tmp_path / "inner")
    err = run(ckpt, "--against", "../port.py")[2]
    assert "give --against ../port.py:Llama or" in err


def test_a_wrong_shape_is_told_with_both(ckpt: Path, run: Callable, offer: Callable) -> None:
    class Short:
        def logits(self, *arguments: Any) -> Any:
            return Planted().logits(*arguments)[:, -1]

    code, out, _ = run(ckpt, "--against", offer(Short()), *QUICK)
    assert code == 1
    assert "(its shape, [2, 300], not [2, 8, 300])" in out
    assert "inf" not in out


def test_where_values_are_not_finite_is_told(ckpt: Path, run: Callable, offer: Callable) -> None:
    class Holes(Planted):
        def traced_decode(self, *arguments: Any) -> Any:
            found, cache = super().traced_decode(*arguments)
            if arguments[2].shape == (2, 8):
                found["norm"][1, 2, 3] = np.nan
            return found, cache

    out = run(ckpt, "--against", offer(Holes()), *QUICK)[1]
    assert "the error is in 1 of 512 values, NaN, the first at [1, 2, 3]" in out


def test_a_context_limit_keeps_llama3s_scaling(
    tmp_path: Path, report: Callable, offer: Callable
) -> None:
    config = LlamaConfig(
        32, 2, 4, 2, 8, 48, 300, max_seq_len=4096, rope_type="llama3", rope_factor=8.0
    )
    path = write(tmp_path / "scaled.safetensors", config)
    found = report(path, "--against", offer(Strict(Limits(context=128))), *QUICK)
    assert found["verdict"]["holds"]
    assert [call["name"] for call in found["calls"]][-1] == "position 120 on"
