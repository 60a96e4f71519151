"""The measure of how many turns an instruction lasts, on answers whose forms are known."""

import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_torch import load
from tools import instruction_turns
from tools.instruction_turns import TurnsConfig, converse
from tools.synthetic import records
from tools.synthetic.lasting import Asked, Lasting, by_turn, keeps, lasting, read_dialogues
from tools.synthetic.tasks import FORMS

from ..support.model_directories import write_model
from ..support.tokenizers import turns

OVER, SO = FORMS[0], FORMS[4]


@given(form=st.sampled_from(FORMS), other=st.sampled_from(FORMS), said=st.text(min_size=1))
def test_an_answer_keeps_a_form_that_was_applied_to_it(form: Any, other: Any, said: str) -> None:
    said = said.strip() or "1"
    assert keeps(form, f" {form.applied(said)}\n")
    assert not keeps(form, form.applied("").strip())
    if form != other:
        assert not keeps(form, other.applied("1 2"))


def test_shares_are_of_a_turn_and_no_turn_counts_after_a_broken_one() -> None:
    asked = [Asked(OVER, ["q"] * 3, ["1", "2", "3"]) for _ in range(4)]
    answers = [
        ["1 over", "2 over", "3 over"],
        ["1 over", "2", "3 over"],
        ["5 over", "2 over", "3"],
        ["1", "2", "3 over"],
    ]
    found = by_turn(asked, answers)
    assert [(one.turn, one.number) for one in found] == [(1, 4), (2, 4), (3, 4)]
    assert [one.kept for one in found] == [0.75, 0.5, 0.75]
    assert [one.right for one in found] == [0.5, 0.5, 0.75]
    assert found[1].error == 0.25
    # 3, 1, 2 and 0 turns: the variance is 5 / 3.
    assert lasting(asked, answers) == Lasting(1.5, pytest.approx((5 / 12) ** 0.5), 0.25)


def test_a_shorter_dialogue_counts_in_its_own_turns() -> None:
    asked = [Asked(OVER, ["q"], ["1"]), Asked(SO, ["q", "r"], ["1", "2"])]
    found = by_turn(asked, [["1 over"], ["So 1", "2"]])
    assert [(one.number, one.kept) for one in found] == [(2, 1.0), (1, 0.0)]


@pytest.mark.parametrize("every_turn", [False, True])
@pytest.mark.parametrize("place", ["system", "user"])
def test_a_dialogue_goes_on_with_the_models_own_answers(place: Any, every_turn: bool) -> None:
    prompts: list[Any] = []

    def chat_batch(conversations: Any, settings: Any, max_rows: int) -> list[Any]:
        assert settings.temperature == 0
        prompts.extend(conversations)
        return [SimpleNamespace(text=f" said {len(prompts)} ") for _ in conversations]

    asked = [Asked(OVER, ["a", "b", "c"], ["1", "2", "3"])]
    config = TurnsConfig("m", "f", place=place, every_turn=every_turn, turns=2)
    model: Any = SimpleNamespace(chat_batch=chat_batch)
    assert converse(model, asked, config) == [["said 1", "said 2"]]
    told = OVER.instruction
    system = turns([], told) if place == "system" else []
    first = "a" if place == "system" else f"{told}\na"
    second = f"{told}\nb" if every_turn else "b"
    assert prompts == [system + turns([first]), system + turns([first, "said 1", second])]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_model(folder, "bytes")
    return folder


@pytest.fixture
def dialogues(tmp_path: Path) -> Path:
    path = tmp_path / "dialogues.jsonl"
    drawn = records.dialogues(random.Random(0), 3, 8)
    path.write_text("".join(json.dumps(one) + "\n" for one in drawn))
    return path


def test_a_checkpoint_is_measured(
    model: Path, dialogues: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [str(model), str(dialogues), "--turns", "2", "--max-new-tokens", "3"]
    assert instruction_turns.main([*flags, "--json", "--batch-size", "2"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [turn["number"] for turn in told["turns"]] == [3, 3]
    assert told["lasting"] == {"turns": 0, "error": 0, "never_broken": 0}
    assert instruction_turns.main([*flags, "--limit", "1"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "an instruction lasts 0.00 turns of 2 (standard error 0.00); 0.0% of the" in said


WRONG = {
    "a line": ('{"form": "Rhyme.", "messages": []}', [], "{path}:1: is no dialogue of tools/tasks"),
    "no JSON": ("[" * 100_000, [], "{path}:1: is no dialogue of tools/tasks.py"),
    "roles": (json.dumps({"form": OVER.instruction, "messages": turns(["a"])}), [], "{path}:1: is"),
    "none": ("", [], "{path}: holds no dialogue"),
    "a length": (None, ["--turns", "-1"], "--turns must be at least 0, got -1"),
    "beyond the context": (None, ["--max-new-tokens", "20"], "; --turns "),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_measured_is_one_line(
    name: str, model: Path, dialogues: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content, more, message = WRONG[name]
    if content is not None:
        dialogues.write_text(content)
    assert instruction_turns.main([str(model), str(dialogues), *more]) == 2
    lines = capsys.readouterr().err.splitlines()
    [error] = [line for line in lines if not line.startswith("note: ")]
    assert error.startswith("error: ")
    assert message.format(path=dialogues) in error


def test_a_missing_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert instruction_turns.main([str(tmp_path), str(tmp_path / "none")]) == 2
    assert "none: no such file; write it with" in capsys.readouterr().err


def test_the_files_dialogues_are_those_drawn(dialogues: Path, model: Path) -> None:
    found = read_dialogues(dialogues)
    drawn = list(records.dialogues(random.Random(0), 3, 8))
    assert [one.form.instruction for one in found] == [one["form"] for one in drawn]
    for one, record in zip(found, drawn, strict=True):
        said = [message["content"] for message in record["messages"]]
        assert (one.questions, one.contents) == (said[::2], said[1::2])
    assert load(model).model.config.max_seq_len < 8 * 20  # as "beyond the context" asks for
