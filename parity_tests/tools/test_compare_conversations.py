"""compare.py --sft: labels, activations and a step of real conversations."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llama_torch.data import conversations as reader
from llama_torch.model.config import ModelConfig
from llama_torch.training import batch, labels
from reference_np.limits import Limits
from reference_np.ops import IGNORE

from ..backends.torch_model import write_model
from ..conformance.oracle import Oracle
from ..support.tokenizers import byte_level, spaced, turns

SHORT = ("--tokens", 80)
SAID = [["Sort 3 1", "1 3", "And 0?", "0 1 3"], ["Add 2 2", "4"], ["Count a a", "2"], ["Hi", "Hi"]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_model(folder, ModelConfig(16, 1, 2, 1, 8, 24, 700, max_seq_len=200), seed=1)
    return byte_level(folder)


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("said") / "said.jsonl"
    path.write_text("".join(json.dumps({"messages": turns(texts)}) + "\n" for texts in SAID))
    return path


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_conversations_agree(
    model: Path, said: Path, report: Callable[..., dict[str, Any]], dtype: str
) -> None:
    """Every token of every conversation is in a call, and labels, loss and update hold."""
    found = report(model, "--sft", said, *SHORT, "--dtype", dtype)
    assert found["verdict"]["holds"]
    assert [call["name"] for call in found["calls"]] == ["conversations 1", "conversations 2"]
    names = [row["name"] for row in found["training"]["rows"]]
    assert names[:5] == ["sft tokens", "sft targets", "sft positions", "sft mask", "loss"]
    assert f"4 conversations of {said}" in found["training"]["notes"][0]
    assert not found["warnings"]


def test_answers_of_weight_0_are_not_learnt(
    model: Path, tmp_path: Path, report: Callable[..., dict[str, Any]]
) -> None:
    path = tmp_path / "weighed.jsonl"
    asked, answered, again, last = turns(SAID[0])
    path.write_text(json.dumps({"messages": [asked, answered | {"weight": 0}, again, last]}))
    found = report(model, "--sft", path, *SHORT)
    assert found["verdict"]["holds"]
    assert f"1 conversations of {path}, 6 tokens" in found["training"]["notes"][0]


def prompts_learnt(patch: pytest.MonkeyPatch) -> None:
    """Learn what the user says too (nanochat and others: a mask that is lost)."""
    real = labels.labels

    def learnt(segments: Any) -> Any:
        return real([segment._replace(learnt=True) for segment in segments])

    patch.setattr(labels, "labels", learnt)


def ends_forgotten(patch: pytest.MonkeyPatch) -> None:
    """Leave out the end token of each answer, as where it is the padding too (trl#976)."""
    real = labels.labels

    def without(segments: Any) -> Any:
        tokens, targets = real(segments)
        targets = np.where(targets == segments[-1].ids[-1], IGNORE, targets)
        return tokens, targets

    patch.setattr(labels, "labels", without)


def positions_kept(patch: pytest.MonkeyPatch) -> None:
    """Count positions on through a window (LlamaFactory#7318)."""
    real = batch.by_document

    def by_document(*given: Any) -> Any:
        found = real(*given)
        return found._replace(positions=torch.arange(found.tokens.shape[1])[None])

    patch.setattr(labels, "by_document", by_document)


def others_seen(patch: pytest.MonkeyPatch) -> None:
    """Let a conversation see those before it (transformers#46634)."""
    real = batch.by_document

    def by_document(tokens: Any, targets: Any, document: Any) -> Any:
        found = real(tokens, targets, document)
        return found._replace(mask=torch.ones_like(found.dense_mask).tril())

    patch.setattr(labels, "by_document", by_document)


@pytest.mark.parametrize(
    ("fault", "wrong"),
    [
        (prompts_learnt, ["sft targets"]),
        (ends_forgotten, ["sft targets"]),
        (positions_kept, ["sft positions"]),
        (others_seen, ["sft mask"]),
    ],
)
def test_a_fault_of_the_labels_is_named(
    fault: Callable[[pytest.MonkeyPatch], None],
    wrong: list[str],
    model: Path,
    said: Path,
    report: Callable[..., dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fault(monkeypatch)
    found = report(model, "--sft", said, *SHORT, "--dtype", "float64")
    assert not found["verdict"]["holds"]
    rows = found["training"]["rows"]
    assert [row["name"] for row in rows if row["status"] != "ok"] == wrong


class LearnsPrompts(Oracle):
    """A port whose loss takes every target, answers and prompts alike."""

    def loss_and_grads(self, config: Any, params: Any, batches: Any, z_loss: float) -> Any:
        whole = []
        for given in batches:
            targets = np.where(given.targets == IGNORE, np.roll(given.tokens, -1), given.targets)
            whole.append(given._replace(targets=targets))
        return super().loss_and_grads(config, params, whole, z_loss)


class OwnMasks(Oracle):
    """The oracle without masks and positions of the caller's."""

    limits = replace(Limits(), masks="causal", positions="consecutive")


def test_a_ports_step_is_compared_and_no_labels(
    model: Path, said: Path, report: Callable[..., dict[str, Any]], offer: Callable[..., str]
) -> None:
    """A port has no labels to show; one without masks has a conversation in each row."""
    argv = (model, "--sft", said, *SHORT, "--dtype", "float64", "--against")
    found = report(*argv, offer(LearnsPrompts()))
    assert found["training"]["rows"][0]["name"] == "loss"
    assert found["training"]["rows"][0]["status"] == "diverges"
    found = report(*argv, offer(OwnMasks()))
    assert found["verdict"]["holds"]
    assert found["training"]["notes"][0].startswith("2 conversations of")


def test_transformers_agrees(
    model: Path, said: Path, report: Callable[..., dict[str, Any]]
) -> None:
    """On packed conversations too, and on the loss of answers alone."""
    pytest.importorskip("transformers")
    found = report(model, "--sft", said, *SHORT, "--against", "hf:float64")
    assert found["verdict"]["holds"]
    assert found["training"]["rows"][0]["name"] == "loss"


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (
            ["--template", "llama2"],
            "--template writes the conversations of --sft or --reward; give",
        ),
        (["--sft", "{said}", "--prompt", "Hi"], "--prompt: --sft has its own tokens"),
        (["--sft", "{said}", "--ids", "3"], "--ids: --sft has its own tokens"),
        (["--sft", "{said}.no"], "said.jsonl.no"),
        (["--sft", "{said}", "--tokens", "4"], "no conversation has 4 tokens or less"),
        (["--sft", "{said}", "--template", "none.jinja"], "none.jinja"),
        (["--sft", "{said}", "--against", "torch:bfloat16"], "--sft compares in float32 or"),
        (["--sft", "{said}", "--json", "{said}"], "would overwrite an input"),
    ],
)
def test_what_cannot_be_compared_is_one_line(
    argv: list[str], says: str, model: Path, said: Path, run: Callable[..., tuple[int, str, str]]
) -> None:
    code, out, err = run(model, *(part.format(said=said) for part in argv))
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert says in err
    assert err.count("\n") == 1


def test_a_file_and_a_folder_without_a_template_are_refused(
    model: Path, said: Path, tmp_path: Path, run: Callable[..., tuple[int, str, str]]
) -> None:
    write_model(tmp_path, ModelConfig(16, 1, 2, 1, 8, 24, 700), seed=1)
    spaced(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    code, _, err = run(tmp_path, "--sft", said)
    assert code == 2
    assert "has no chat template" in err


def test_the_conversations_are_those_that_training_reads(
    model: Path, said: Path, run: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    """A line that sft would refuse is refused, by file and line."""
    path = tmp_path / "wrong.jsonl"
    path.write_text(said.read_text() + json.dumps({"messages": turns(["Hi"])}) + "\n")
    with pytest.raises(Exception, match="holds no answer"):
        [*reader.read_conversations([str(path)])]
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[::-1]))
    code, _, err = run(model, "--sft", path)
    assert code == 2
    assert f"--sft {path}: line 1: holds no answer" in err
