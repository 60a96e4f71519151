"""The CPU's way is the quickest of those timed; it is kept a while, and other files are ignored."""

import time
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch

from llama_torch.common.state_file import read_state, write_state
from llama_torch.common.user_cache import user_cache
from llama_torch.inference import cpu_choice, decoding
from llama_torch.inference.config import SamplingConfig
from llama_torch.inference.engine import DecodeBatch, generate
from llama_torch.inference.native_step import NativeStep
from llama_torch.model.config import ModelConfig
from llama_torch.model.cpu_linear import onednn_products, parts_with_products, with_products
from llama_torch.model.llama import Llama, linear_products

quickest = cpu_choice._quickest.__wrapped__  # each call as in a new process
NAMES = ("eager", "numpy")


@pytest.fixture
def seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, float]]:
    """What each way takes, to be changed; no way is run."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    found = {"eager": 2.0, "numpy": 1.0}
    monkeypatch.setattr(cpu_choice, "_ways", lambda work, dtype, names: dict.fromkeys(names))
    monkeypatch.setattr(
        cpu_choice, "time_ways", lambda ways: {name: [each] * 4 for name, each in found.items()}
    )
    return found


@pytest.fixture
def small() -> Llama:
    config = ModelConfig(dim=24, n_layers=2, n_heads=2, n_kv_heads=1, hidden_dim=40, vocab_size=9)
    model = Llama(config)
    model.init_weights(torch.Generator().manual_seed(0))
    return model


def choose(threads: int = 2) -> str:
    return quickest("decode 1", NAMES, torch.float32, threads)


def kept() -> Path:
    [path] = (user_cache() / "quickest").iterdir()
    return path


def test_the_quickest_is_chosen_and_kept(seconds: dict[str, float]) -> None:
    assert choose() == "numpy"
    seconds["eager"] = 0.5
    assert choose() == "numpy", "timed again"
    assert choose(threads=1) == "eager", "kept for other threads"
    assert quickest("decode 1", NAMES, torch.float64, 2) == "eager", "kept for another dtype"


@pytest.mark.parametrize("attribute", ["processor", "libraries"])
def test_it_is_kept_for_this_processor_and_these_libraries(
    attribute: str, seconds: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert choose() == "numpy"
    seconds["eager"] = 0.5
    monkeypatch.setattr(cpu_choice, attribute, lambda: "another")
    assert choose() == "eager"


def after(seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    later = time.time() + seconds
    monkeypatch.setattr(cpu_choice.time, "time", lambda: later)


@pytest.mark.parametrize(
    ("scatter", "kept_for", "forgotten_after"),
    [
        ([1.0, 1.1, 1.2, 9.0], 6 * 24 * 3600, 8 * 24 * 3600),
        ([1.0, 1.3, 1.3, 1.3], 1800, 5400),  # all but one were slowed down
    ],
)
def test_a_choice_is_kept_a_week_and_one_of_a_busy_machine_an_hour(
    scatter: list[float],
    kept_for: float,
    forgotten_after: float,
    seconds: dict[str, float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as busy:
        times = {"numpy": scatter, "eager": [2.0] * 4}
        busy.setattr(cpu_choice, "time_ways", lambda ways: times)
        assert choose() == "numpy"
    seconds["eager"] = 0.5
    with monkeypatch.context() as patch:
        after(kept_for, patch)
        assert choose() == "numpy"
    after(forgotten_after, monkeypatch)
    assert choose() == "eager"


@pytest.mark.parametrize("timed", [None, "now", True, 10**400, "in an hour"])
def test_a_choice_of_no_time_or_of_the_future_is_made_again(
    timed: object, seconds: dict[str, float]
) -> None:
    if timed == "in an hour":  # not in the parameters: every process collects the same ones
        timed = time.time() + 3600
    assert choose() == "numpy"
    path = kept()
    answer, _ = read_state(path, "")
    write_state(path, answer)
    seconds["eager"] = 0.5
    assert choose() == "numpy"
    write_state(path, answer | {"timed": timed})
    assert choose() == "eager"


def test_without_a_home_it_is_chosen_and_not_kept(
    seconds: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", classmethod(homeless))
    assert choose() == "numpy"


def homeless(_: object) -> Path:
    raise RuntimeError("Could not determine home directory.")


def test_the_ways_take_turns() -> None:
    calls: list[str] = []
    times = cpu_choice.time_ways({name: lambda n=name: calls.append(n) for name in "ab"})
    assert "".join(calls) == "ab" + "aabb" * 2
    assert {name: len(each) for name, each in times.items()} == {"a": 4, "b": 4}


def cut(text: str) -> str:
    return text[: len(text) // 2]


@pytest.mark.parametrize(
    "spoil",
    [
        cut,
        lambda text: "",
        lambda text: "[1]",
        lambda text: '{"key": "another", "quickest": "numpy"}',
        lambda text: '{"quickest": "graph"}',
        lambda text: text.replace('"numpy"', '"graph"'),
        lambda text: "\x00" + text,
    ],
)
def test_a_file_that_is_not_ours_is_written_again(
    spoil: Callable[[str], str], seconds: dict[str, float]
) -> None:
    assert choose() == "numpy"
    path = kept()
    path.write_text(spoil(path.read_text()))
    seconds["eager"] = 0.5
    assert choose() == "eager"
    seconds["eager"] = 2.0
    assert choose() == "eager"


def test_a_folder_that_cannot_be_written_is_done_without(
    seconds: dict[str, float], tmp_path: Path
) -> None:
    (tmp_path / "cache").write_text("a file")
    assert choose() == "numpy"


def test_a_way_that_fails_is_left_out() -> None:
    def fail() -> None:
        raise RuntimeError("no such operation")

    times = cpu_choice.time_ways({"missing": fail, "there": lambda: None})
    assert list(times) == ["there"]


def test_where_all_fail_the_first_is_taken(seconds: dict[str, float]) -> None:
    seconds.clear()
    assert choose() == "eager"


@pytest.mark.parametrize(
    ("work", "dtype", "names"),
    [
        ("prompt", torch.float32, ("torch", "onednn")),
        ("decode 1", torch.float32, ("eager", "numpy", "native")),
        ("decode 8", torch.bfloat16, ("eager", "native")),
    ],
)
def test_the_real_ways_are_timed(work: str, dtype: torch.dtype, names: tuple[str, ...]) -> None:
    if "native" in names and not NativeStep.supports(cpu_choice._model(dtype), 1):
        pytest.skip("no C compiler with OpenMP here")
    times = cpu_choice.time_ways(cpu_choice._ways(work, dtype, names))
    assert times.keys() == set(names)
    assert all(0 < each < 10 for each in chain(*times.values()))


def test_the_choice_decides(small: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def answer(work: str, names: tuple[str, ...], *_: object) -> str:
        asked.append(work)
        return "onednn" if work == "prompt" else names[-1]

    monkeypatch.setattr(cpu_choice, "_quickest", answer)
    modes = [decoding.choose_mode("auto", small, rows, 9) for rows in (1, 3, 8, 9, 32, 33)]
    assert asked == ["decode 1", "decode 8", "decode 8", "decode 32", "decode 32"]
    assert modes[-1] == "eager"
    assert decoding.choose_mode("auto", small, 1, 1) == "eager"
    assert DecodeBatch(small, [[1]], [SamplingConfig()]).products is onednn_products
    plain = DecodeBatch(small, [[1]], [SamplingConfig()], decoding="eager")
    assert plain.products is linear_products
    assert len(asked) == 7, "--decoding eager is fixed, whatever is quicker"


def test_every_choice_gives_the_same_tokens(small: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = SamplingConfig(12, temperature=0)
    plain = list(generate(small, [1, 2, 3], settings, decoding="eager"))
    for mode in ("eager", "numpy", *(["native"] if NativeStep.supports(small, 1) else [])):
        for products in ("torch", "onednn"):
            chosen = {"prompt": products, "decode 1": mode}
            monkeypatch.setattr(cpu_choice, "_quickest", lambda work, *_: chosen[work])  # noqa: B023
            assert list(generate(small, [1, 2, 3], settings)) == plain


def test_onednns_products_leave_training_alone(small: Llama) -> None:
    tokens = torch.tensor([[1, 2, 3]])
    plain = small(tokens)[0]
    with with_products(small, onednn_products):
        trained = small(tokens)[0]
        with torch.no_grad():
            multiplied = small(tokens)[0]
    assert torch.equal(trained, plain)
    assert trained.requires_grad
    assert torch.allclose(multiplied, plain, atol=1e-5)
    assert all(part.products is linear_products for part in parts_with_products(small))
    with torch.no_grad(), with_products(small.double(), onednn_products):
        small(tokens)
