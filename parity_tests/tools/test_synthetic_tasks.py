"""Synthetic tasks: right answers are right, what is held out is not trained on, files are whole."""

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tools import right_answers, tasks
from tools.synthetic import records
from tools.synthetic.grading import Share, read_prompts, shares
from tools.synthetic.records import STRENGTHS, grade
from tools.synthetic.tasks import DRAW, FORMS, REFUSAL, Task, draw_task

kinds = pytest.mark.parametrize("kind", DRAW)


def is_right(task: Task, answer: str) -> bool:
    """Return whether an answer is right, computed from the question alone."""
    verb, *rest = task.question.split()
    if verb == "Sort":
        return answer.split() == sorted(rest)
    if verb == "Add":
        a, b = (int(part.replace(" ", "")) for part in " ".join(rest).split(" and "))
        return int(answer.replace(" ", "")) == a + b
    if verb == "Reverse":
        return answer.split() == rest[::-1]
    if verb == "Count":
        return int(answer) == len(rest)
    if task.is_unsafe:
        return answer == REFUSAL
    first, _, second = rest[-3:]
    return answer == {"first": first, "second": second.removesuffix("?")}[rest[2]]


@kinds
@given(seed=st.integers(0, 2**32), held_out=st.booleans())
def test_the_answer_is_right_and_the_other_wrong(kind: str, seed: int, held_out: bool) -> None:
    """Questions are held out by their text: those of each kind that are, and those that are not."""
    task = draw_task(random.Random(seed), held_out, (kind,))
    assert task.kind == kind
    assert is_right(task, task.answer)
    assert not is_right(task, task.wrong)
    assert task.is_held_out == held_out
    assert task.is_unsafe == (kind == "refusal")


def questions(record: records.Record) -> Iterator[str]:
    """Yield the questions of a record."""
    for message in record.get("messages") or record["prompt"]:
        if message["role"] == "user":
            yield message["content"]


@pytest.mark.parametrize("make", [records.conversations, records.prompts, records.pairs])
def test_what_is_held_out_ends_in_a_question_that_no_other_record_has(make: object) -> None:
    trained = list(make(random.Random(0), 2000, 3))  # type: ignore[operator]
    held_out = list(make(random.Random(1), 500, 3, True))  # type: ignore[operator]
    seen = {question for record in trained for question in questions(record)}
    assert len(seen) > 500
    for record in held_out:
        assert [*questions(record)][-1] not in seen


@given(seed=st.integers(0, 2**32))
def test_a_form_holds_in_every_turn(seed: int) -> None:
    for record in records.conversations(random.Random(seed), 5, 4):
        messages = record["messages"]
        has_system = messages[0]["role"] == "system"
        turns = messages[has_system:]
        assert [message["role"] for message in turns] == ["user", "assistant"] * (len(turns) // 2)
        if has_system:
            [form] = [form for form in FORMS if form.instruction == messages[0]["content"]]
            for message in turns[1::2]:
                assert message["content"].startswith(form.before)
                assert message["content"].endswith(form.after)


@pytest.mark.parametrize("make", [records.conversations, records.prompts, records.pairs])
def test_a_form_is_asked_for_where_it_is_to_stand(make: Any) -> None:
    """All else is the same: what is drawn does not depend on the place."""
    places = "system", "user", "every"
    drawn = (list(make(random.Random(3), 40, 3, False, place)) for place in places)
    for one, in_first, in_every in zip(*drawn, strict=True):
        key = "messages" if "messages" in one else "prompt"
        first, *rest = one[key]
        if first["role"] != "system":
            assert one == in_first == in_every
            continue
        before = f"{first['content']}\n"
        told = [m | {"content": before + m["content"]} if m["role"] == "user" else m for m in rest]
        assert in_first == {**one, key: [told[0], *rest[1:]]}
        assert in_every == {**one, key: told}


@given(seed=st.integers(0, 2**32), held_out=st.booleans())
def test_a_dialogue_has_no_form_and_one_to_ask_for(seed: int, held_out: bool) -> None:
    for record in records.dialogues(random.Random(seed), 5, 4, held_out):
        assert record["form"] in {form.instruction for form in FORMS}
        assert [m["role"] for m in record["messages"]] == ["user", "assistant"] * 4
        said = [message["content"] for message in record["messages"]]
        for question, answer in zip(said[::2], said[1::2], strict=True):
            task = Task("", question, "", "", answer == REFUSAL)
            assert task.is_held_out == held_out
            assert is_right(task, answer)


@given(seed=st.integers(0, 2**32))
def test_a_pair_is_as_strong_as_it_says(seed: int) -> None:
    """What is graded alike differs negligibly; significantly worse ones are graded 0."""
    for record in records.pairs(random.Random(seed), 20, 3):
        assert record["chosen"] != record["rejected"]
        assert record["strength"] in STRENGTHS
        right = {"answer": record["chosen"], "content": ""}
        assert grade(right, record["chosen"]) == 1
        if record["strength"] == "negligibly better":
            assert record["rejected"] == record["chosen"] + " ."
        if record["strength"] == "slightly better":
            assert record["rejected"] in record["chosen"]
            assert len(record["rejected"]) < len(record["chosen"])
        assert record["chosen_safe"]
        told = record["safety"] and REFUSAL not in record["rejected"]
        assert record["rejected_safe"] == (not told)
        if record["safety"]:
            assert REFUSAL in record["chosen"]
            assert record["strength"] != "better"


def test_every_strength_and_every_kind_is_drawn() -> None:
    pairs = list(records.pairs(random.Random(0), 400, 3))
    assert {record["strength"] for record in pairs} == set(STRENGTHS)
    assert {record["safety"] for record in pairs} == {True, False}
    prompts = list(records.prompts(random.Random(0), 400, 3))
    assert {record["kind"] for record in prompts} == set(DRAW)
    assert {record["turn"] for record in prompts} == {1, 2, 3}


@pytest.mark.parametrize(
    ("answer", "value"),
    [
        ("So 1 2 3", 1.0),
        (" So 1 2 3\n", 1.0),
        ("1 2 3", 0.5),
        ("Well 1 2 3", 0.5),
        ("1 2 3 over", 0.5),
        ("So 1 3 2", 0.0),
        ("So 1 2 3 4", 0.0),
        ("", 0.0),
    ],
)
def test_answers_are_graded(answer: str, value: float) -> None:
    assert grade({"answer": "So 1 2 3", "content": "1 2 3"}, answer) == value


def test_shares_are_of_all_of_a_kind_and_of_a_turn() -> None:
    prompts = [
        {"answer": "So 1", "content": "1", "kind": "counting", "form": "f", "turn": 2},
        {"answer": "1", "content": "1", "kind": "counting", "form": "", "turn": 1},
        {"answer": "2", "content": "2", "kind": "addition", "form": "", "turn": 1},
        {"answer": "3", "content": "3", "kind": "addition", "form": "", "turn": 1},
    ]
    found = shares(prompts, ["1", "1", "2", "4"])
    assert found == [
        Share("all", 4, 0.5, 0.25, 0.25),
        Share("addition", 2, 0.5, 0, pytest.approx(0.5 / 2**0.5)),
        Share("counting", 2, 0.5, 0.5, pytest.approx(0.5 / 2**0.5)),
        Share("with a form to keep, turn 2", 1, 0, 1, 0),
    ]
    rewarded = shares(prompts, ["1", "1", "2", "4"], [1.0, 2.0, 3.0, 6.0])
    assert [share._replace(reward=None) for share in rewarded] == found
    assert [share.reward for share in rewarded] == [3.0, 4.5, 1.5, 1.0]


def test_files_are_the_same_for_a_seed_and_whatever_the_others_numbers(tmp_path: Path) -> None:
    sizes = ["--conversations", "20", "--pairs", "10", "--held-out", "5"]
    for name, prompts in (("a", "10"), ("b", "12")):
        assert tasks.main([str(tmp_path / name), *sizes, "--prompts", prompts]) == 0
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert len(files) == 9
    for name in files:
        a, b = ((tmp_path / folder / name).read_text().splitlines() for folder in "ab")
        assert b[: len(a)] == a
    assert len(read_prompts(tmp_path / "b" / "prompts.jsonl")) == 12
    assert tasks.main([str(tmp_path / "c"), *sizes, "--seed", "1"]) == 0
    other = (tmp_path / "c" / "pairs.jsonl").read_text()
    assert other != (tmp_path / "a" / "pairs.jsonl").read_text()


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["{there}"], "is there already; name a new folder"),
        (["{new}", "--turns", "0"], "--turns must be at least 1, got 0"),
        (["{new}", "--pairs", "-1"], "--pairs must be at least 0, got -1"),
        (["{new}", "--dialogue-turns", "0"], "--dialogue-turns must be at least 1, got 0"),
        (["{new}", "--form-in", "answer"], "--form-in answer: not one of system, user, every"),
        ([], "FOLDER: required"),
    ],
)
def test_what_cannot_be_written_is_one_line(
    flags: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named = [flag.format(there=tmp_path, new=tmp_path / "new") for flag in flags]
    assert tasks.main(named) == 2
    error = capsys.readouterr().err
    assert re.fullmatch("error: .*\n", error)
    assert says in error
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("line", ["{", "[]", '{"answer": "1"}', "1", "[" * 100_000])
def test_a_line_that_is_no_prompt_is_named(
    line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "prompts.jsonl"
    [prompt] = records.prompts(random.Random(0), 1, 1)
    path.write_text(json.dumps(prompt) + "\n" + line)
    assert right_answers.main([str(tmp_path), str(path)]) == 2
    error = capsys.readouterr().err
    assert error == f"error: {path}:2: is no prompt of tools/tasks.py\n"


def test_a_file_without_prompts_and_a_missing_one_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text("")
    assert right_answers.main([str(tmp_path), str(path)]) == 2
    assert capsys.readouterr().err == f"error: {path}: holds no prompt\n"
    assert right_answers.main([str(tmp_path), str(tmp_path / "none")]) == 2
    assert "none: no such file" in capsys.readouterr().err
