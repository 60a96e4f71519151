"""The picture of attention to an instruction: its numbers, from the oracle, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_torch.tokenizer.answers import spelled
from llama_torch.tokenizer.loading import load_tokenizer
from reference_np.checkpoint import Checkpoint
from reference_np.model import forward
from tools import attention_plot
from tools.attention_plot import (
    AttentionConfig,
    attention_weights,
    binned,
    places_of,
    read_dialogue,
    to_instruction,
)

from ..support.fine_tuning import agree
from ..support.model_directories import CONFIGS, write_model
from ..support.tokenizers import turns

TOLD = "Speak as a cat."
SAID = ["Who are you?", "A cat.", "And then?", "Purr."]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_model(folder, "bytes")
    return folder


@pytest.fixture
def said(tmp_path: Path) -> Path:
    path = tmp_path / "said.jsonl"
    given = turns(SAID[:2]), turns(SAID, TOLD)
    path.write_text("".join(json.dumps({"messages": one}) + "\n" for one in given))
    return path


def test_each_token_pays_all_its_attention_to_itself_and_those_before(model: Path) -> None:
    """Of every layer and head."""
    config, ids = CONFIGS["bytes"], [3, 50, 60, 7, 9]
    weights_LHTS = attention_weights(model, ids)
    assert weights_LHTS.shape == (config.n_layers, config.n_heads, 5, 5)
    assert np.allclose(weights_LHTS.sum(-1), 1)
    assert not np.triu(weights_LHTS, 1).any()


def test_the_weights_are_those_that_the_forward_pass_mixes(model: Path) -> None:
    """In layer 0, mixed by hand: the heads' outputs are those of a trace."""
    config, ids = CONFIGS["bytes"], [3, 50, 60, 7, 9]
    checkpoint, traced = Checkpoint(model), {}
    forward(checkpoint, np.array([ids]), checkpoint.config, trace=traced.__setitem__)
    v_TNK = traced["layers.0.v"][0]
    v_THK = v_TNK.repeat(config.n_heads // config.n_kv_heads, 1)
    mixed_THK = np.einsum("hts,shk->thk", attention_weights(model, ids)[0], v_THK)
    assert agree(mixed_THK, traced["layers.0.attn"][0], 1e-5)  # float32


def test_the_most_of_any_head_is_taken_of_all_the_instructions_tokens() -> None:
    weights_LHTS = np.zeros((1, 2, 3, 3))
    weights_LHTS[0, 0, 2] = [0.25, 0.5, 0.25]
    weights_LHTS[0, 1, 2] = [0.125, 0.0, 0.875]
    weights_LHTS[0, :, 0, 0] = 1
    assert to_instruction(weights_LHTS, [1, 2]).tolist() == [0, 0, 0.875]
    assert to_instruction(weights_LHTS, [0, 1]).tolist() == [1, 0, 0.75]


@given(n=st.integers(1, 9), size=st.integers(1, 5))
def test_bins_are_means_of_neighbours(n: int, size: int) -> None:
    values = np.random.default_rng(n).random((n, n + 1))
    found = binned(values, size)
    assert found.shape == (-(-n // size), -(-(n + 1) // size))
    for (i, j), value in np.ndenumerate(found):
        block = values[i * size : (i + 1) * size, j * size : (j + 1) * size]
        assert value == pytest.approx(block.mean(), abs=1e-12)


def test_the_instruction_and_the_answers_are_found_in_the_tokens(model: Path, said: Path) -> None:
    config = AttentionConfig("a.png", str(model), str(model), str(said), number=2)
    found = read_dialogue(config)
    tokenizer = load_tokenizer(model, CONFIGS["bytes"].vocab_size)
    text = spelled(tokenizer, [found.ids[i] for i in found.told])
    assert TOLD in text
    assert len(text) < len(TOLD) + 8  # a token may reach beyond it
    assert found.told == list(range(found.told[0], found.told[-1] + 1))
    assert [tokenizer.decode(found.ids[begin : end - 1]) for begin, end in found.answers] == [
        "A cat.",
        "Purr.",
    ]
    again = places_of(tokenizer, found.ids, "And then?")
    assert "And then?" in spelled(tokenizer, [found.ids[i] for i in again])


def test_a_picture_is_drawn_and_drawn_alike_again(
    model: Path, said: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "picture.svg"
    flags = ["--before", str(model), "--after", str(model), "--data", str(said), "--number", "2"]
    assert attention_plot.main([str(out), *flags]) == 0
    before, after = (float(word) for word in capsys.readouterr().out.split() if word[:2] == "0.")
    assert before == after > 0
    assert out.stat().st_size > 10_000
    first = out.read_bytes()
    assert attention_plot.main([str(out), *flags]) == 0
    assert out.read_bytes() == first


WRONG = {
    "another ending": (["a.txt"], "a.txt: the picture's name must end in .svg, .png, .pdf"),
    "no instruction": (["a.png"], "--instruction is missing: the conversation has no system"),
    "another text": (["a.png", "--instruction", "Bark."], "'Bark.': the dialogue does not say it"),
    "too few": (["a.png", "--number", "3"], "--number 3: --data holds 2 conversations"),
    "a bin": (["a.png", "--bin", "0"], "--bin must be positive"),
    "no model": (["a.png", "--after", "none"], "none: no such file"),
    "other tokens": (["a.png", "--number", "2", "--after", "{other}"], "--after {other}: "),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_drawn_is_one_line(
    name: str, model: Path, said: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (out, *more), message = WRONG[name]
    other = tmp_path / "other"
    write_model(other, "pieces")
    flags = {"--before": str(model), "--after": str(model), "--data": str(said)}
    given = iter(more)
    flags |= {flag: value.format(other=other) for flag, value in zip(given, given, strict=True)}
    words = [word for pair in flags.items() for word in pair]
    assert attention_plot.main([str(tmp_path / out), *words]) == 2
    lines = capsys.readouterr().err.splitlines()
    [error] = [line for line in lines if not line.startswith("note: ")]
    assert error.startswith("error: ")
    assert message.format(other=other) in error
    assert not (tmp_path / out).exists()
