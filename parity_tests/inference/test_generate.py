"""The command generate: its output, and its errors."""

import json
from pathlib import Path

import pytest
import torch

from llama_torch import generate


def run(capsys: pytest.CaptureFixture[str], folder: Path, *flags: str) -> str:
    assert generate.main(["--ckpt", str(folder), "--max-new-tokens", "5", *flags]) == 0
    return capsys.readouterr().out


def test_the_command_writes_text(model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = run(capsys, model_dir, "--prompt", "Hello world")
    assert first.startswith("Hello world")
    assert len(first) > len("Hello world\n")
    assert run(capsys, model_dir, "--prompt", "Hello world") == first
    assert run(capsys, model_dir, "--prompt", "Hello world", "--seed", "1") != first


def test_several_prompts_get_the_completions_that_each_gets_alone(
    model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = ["Hello world, and more", "The", "1 2 3"]
    out = run(capsys, model_dir, "--json", "--logprobs", "1", "--prompt", *prompts)
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["prompt"] for row in rows] == prompts
    for i, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
        assert run(capsys, model_dir, "--prompt", prompt, "--seed", str(i)) == (
            f"{prompt}{row['text']}\n"
        )
        assert len(row["token_ids"]) == len(row["logprobs"]) == len(row["likeliest"]) == 5
        assert all(
            logprob <= best[0][1]
            for logprob, best in zip(row["logprobs"], row["likeliest"], strict=True)
        )
    shown = run(capsys, model_dir, "--logprobs", "2", "--prompt", "The")
    assert shown.splitlines()[-2].startswith("  ")


@pytest.mark.parametrize(
    ("flags", "more"),
    [
        ([], []),
        (["--logprobs", "0"], ["logprobs"]),
        (["--logprobs", "2"], ["logprobs", "likeliest"]),
    ],
)
def test_json_has_the_log_probabilities_that_were_asked_for(
    flags: list[str], more: list[str], model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = json.loads(run(capsys, model_dir, "--json", "--prompt", "The", *flags))
    assert list(row) == ["prompt", "text", "finish_reason", "token_ids", *more]
    assert row["finish_reason"] == "length"
    for key in more:
        assert len(row[key]) == 5
        assert all(row[key]), row


def test_a_draft_changes_nothing(model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = run(capsys, model_dir, "--prompt", "Hello world")
    flags = ("--draft", str(model_dir), "--guesses", "3")
    assert run(capsys, model_dir, "--prompt", "Hello world", *flags) == plain
    both = ("--ckpt", str(model_dir), "--prompt", "one", "two")
    assert generate.main([*both, *flags]) == 2
    assert "one prompt at a time" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--decoding", "kernels"), "--decoding kernels needs a GPU"),
        (("--decoding", "graph"), "--decoding graph needs a GPU"),
        (("--decoding", "numpy", "--dtype", "bfloat16"), "in float32 or float64"),
        (("--guesses", "0"), "guesses"),
        (("--draft", "nowhere"), "nowhere"),
    ],
)
def test_a_mode_that_cannot_run_is_refused(
    flags: tuple[str, ...], message: str, model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if "GPU" in message and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert generate.main(["--ckpt", str(model_dir), "--prompt", "a", *flags]) == 2
    found = capsys.readouterr()
    assert message in found.err
    assert found.out == ""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--top-k": "9" * 30}, "--top-k must be below"),
        ({"--max-new-tokens": "9" * 400}, "--max-new-tokens must be"),
        ({"--prefill-chunk": "9" * 30}, "--prefill-chunk must be"),
        ({"--repetition-penalty": "1e-320"}, "--repetition-penalty must lie"),
        ({"--ckpt": "nowhere"}, "nowhere: no such file"),
        ({"--prompt": "word " * 30}, "the prompt is 31 tokens long and the context holds 24"),
        ({"--prompt": ""}, "--prompt must not be empty"),
        ({"--temperature": "-1"}, "--temperature must be"),
        ({"--top-p": "0"}, "--top-p must be"),
        ({"--top-k": "-2"}, "--top-k must be"),
        ({"--min-p": "2"}, "--min-p must be"),
        ({"--repetition-penalty": "0"}, "--repetition-penalty must lie"),
        ({"--max-new-tokens": "0"}, "--max-new-tokens must be"),
        ({"--prefill-chunk": "0"}, "--prefill-chunk must be"),
        ({"--stop": ""}, "--stop must not be empty"),
        ({"--stop-tokens": "<|nope|>"}, "--stop-tokens '<|nope|>' is 6 tokens"),
        ({"--seed": "-1"}, "--seed must"),
    ],
)
def test_bad_input_is_one_line(
    model_dir: Path, change: dict[str, str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = {"--ckpt": str(model_dir), "--prompt": "Hello"} | change
    assert generate.main([part for pair in flags.items() for part in pair]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert captured.err.count("\n") == 1
