"""compare.py: the calls made of an input, the report's schema, and bad input."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from llama_common.memory import gib, host_memory
from llama_parity.comparison.inputs import make_calls
from llama_parity.comparison.trace_format import n_cached
from reference_np.config import LlamaConfig

from ..backends.torch_model import save_numpy
from ..planted.port import Planted
from .comparing import CONFIG, QUICK, write


def test_calls_are_consistent() -> None:
    calls = make_calls(np.arange(1, 40), CONFIG, (30, 7), 2)
    assert [call.name for call in calls[:4]] == [
        "30 tokens",
        "30 tokens, then 2",
        "30 tokens, step 1",
        "30 tokens, step 2",
    ]
    assert len(calls) == 11
    assert n_cached(calls, 3) == 33
    for c, call in enumerate(calls):
        if call.mask is not None:
            length = call.tokens.shape[1]
            assert call.mask.shape == (2, length, n_cached(calls, c) + length)
            assert call.mask[:, np.arange(length), np.arange(-length, 0)].all()  # sees itself
        assert call.positions is None or call.positions.max() < CONFIG.max_seq_len


@pytest.mark.parametrize("ids", [[7], [7, 8], [5, 5, 5, 5], [1, 2, 3] * 9])
def test_rows_differ_whatever_the_ids(ids: list[int]) -> None:
    """With two equal rows, a batch whose rows are exchanged would pass."""
    for call in make_calls(np.array(ids), CONFIG, (len(ids),), 2):
        real = call.tokens if call.mask is None else call.tokens[:, -1:]
        assert len(real) == 1 or (real[0] != real[1]).all()


def test_many_steps(tmp_path: Path, run: Callable) -> None:
    """A chain of calls longer than Python's stack is deep."""
    config = LlamaConfig(8, 1, 2, 1, 4, 12, 60, max_seq_len=4096)
    calls = make_calls(np.arange(3), config, (3,), 1200)
    assert n_cached(calls, 1201) == 3 + 2 + 1199


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--tokens", 10**9), "a prompt of 1,000,000,000 tokens (--tokens): the oracle's scores"),
        (("--tokens", 2**63), "a prompt of 2,147,483,643 tokens (--tokens): the oracle's scores"),
        (("--steps", 2 * 10**9), "--steps 2000000000: the calls take at least"),
    ],
)
def test_runs_that_no_memory_holds_are_refused_before_they_are_made(
    tmp_path: Path, run: Callable, flags: tuple[str, int], message: str
) -> None:
    config = LlamaConfig(8, 1, 2, 1, 4, 12, 60, max_seq_len=2**31 - 1)
    code, out, err = run(write(tmp_path / "long.safetensors", config), *flags)
    assert (code, out) == (2, "")
    assert message in err
    assert f"and this machine has {gib(host_memory())}; give fewer" in err
    assert err.count("\n") == 1


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
    found = report(path, "--prompt", "Hello world", "--steps", 0)
    assert found["calls"][0]["tokens"][0] == [15496, 995]
    text = tmp_path / "text.txt"
    text.write_text("Hello world", encoding="utf-8")
    assert report(path, "--file", text, "--steps", 0)["calls"] == found["calls"]
    assert report(path, "--ids", 15496, 995, "--steps", 0)["calls"] == found["calls"]
    found = report(path, "--tokens", 5, 9)
    assert {"5 tokens", "9 tokens, step 2"} <= {call["name"] for call in found["calls"]}


def test_the_reports_schema(ckpt: Path, run: Callable, tmp_path: Path, offer: Callable) -> None:
    path, html = tmp_path / "report.json", tmp_path / "report.html"
    spec = offer(Planted("silu_on_up"))
    code, out, _ = run(ckpt, "--against", spec, "--grads", "--json", path, "--html", html)
    assert code == 2  # the planted port offers no gradients
    code, out, _ = run(ckpt, *QUICK, "--against", spec, "--json", path, "--html", html)
    assert code == 1
    found = json.loads(path.read_text())
    assert found["schema"] == "llama-compare/2"
    assert set(found) == {
        *("schema", "title", "checkpoint", "against", "dtype", "n_layers", "layers", "calls"),
        *("coverage", "verdict", "rows", "first_divergence", "diagnosis", "unexplained"),
        *("diverging", "logits", "logprobs", "engines", "heatmap", "training", "warnings"),
    }
    row = found["rows"][0]
    assert set(row) == {"call", "name", "status", "inherited", "fresh", "layer", "kind"}
    assert set(row["fresh"]) == {"rms", "worst", "token", "bound", "share"}
    page = html.read_text()
    assert found["verdict"]["line"].split(";")[0] in page
    assert "silu_on_up" in page
    assert "://" not in page.replace("http://www.w3.org", "")  # the page loads nothing
    assert found["verdict"]["line"] in out


def test_bad_input_is_one_line(ckpt: Path, run: Callable, tmp_path: Path) -> None:
    other = dataclasses.replace(CONFIG, rope_theta=1e6)
    save_numpy(load_file(ckpt), tmp_path / "other.safetensors", {"config": other.to_json()})
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(ckpt.read_bytes()[:-1])
    for argv, message in (
        (["nowhere.safetensors"], "nowhere.safetensors: no such file"),
        ([broken], "not a complete safetensors file"),
        ([ckpt, "--against", broken], "not a complete safetensors file"),
        ([ckpt, "--against", tmp_path / "other.safetensors"], "rope_theta 1000000.0 for 500000.0"),
        ([ckpt, "--against", "nothing"], "--against nothing: no such file"),
        ([ckpt, "--against", "nothing"], "or FILE.py:object, or one of torch, cuda, hf"),
        ([ckpt, "--against", "a.safetensors"], ", package.module:object or FILE.py:object\n"),
        ([ckpt, "--against", "no.module:it"], "--against no.module:it: cannot be imported"),
        ([ckpt, "--against", "torch:float64", "--dtype", "float32"], "disagree"),
        ([ckpt, "--against", "torch:bfloat16", "--grads"], "--grads compares in float32"),
        ([ckpt, "--prompt", "text"], "--prompt needs the GPT-2 encoding"),
        ([ckpt, "--ids", "300"], "300 is outside the vocabulary"),
        ([ckpt, "--ids", "1", "--prompt", "a"], "exclude each other"),
        ([ckpt, "--file", "nowhere.txt"], "--file nowhere.txt: cannot be read"),
        ([ckpt, "--tokens", "0"], "--tokens must be positive"),
        ([ckpt, "--steps", "-1"], "--steps must not be negative"),
        ([ckpt, "--layers", "2:9"], "the model has layers 0 to 1"),
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
