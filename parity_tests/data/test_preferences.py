"""Readers of pairs of answers: the forms that people have, and what is refused by file and line."""

import json
from pathlib import Path
from typing import Any

import pytest

from llama_common.errors import InputError
from llama_torch.data.preferences import NOT_GIVEN, SPELLINGS, STRENGTHS, read_pairs

from ..support.tokenizers import turns

ASKED = turns(["Sort 3 1"])
MORE = turns(["Sort 3 1", "1 3", "And 2"])
HH = "\n\nHuman: Sort 3 1\n\nAssistant: 1 3\n\nHuman: And 2\n\nAssistant:"
RIGHT, WRONG = turns(["Sort 3 1", "1 3"]), turns(["Sort 3 1", "3 1"])
LONG_RIGHT, LONG_WRONG = ([*MORE, {"role": "assistant", "content": c}] for c in ("1 2 3", "2"))
ANSWERS = {"chosen": "1 3", "rejected": "3 1"}
FORMS: dict[str, tuple[dict[str, Any], list[dict[str, str]], list[dict[str, str]]]] = {
    "texts": ({"prompt": "Sort 3 1", **ANSWERS}, RIGHT, WRONG),
    "prompt's messages": ({"prompt": ASKED, **ANSWERS}, RIGHT, WRONG),
    "answers' messages": (
        {"prompt": ASKED, "chosen": RIGHT[1:], "rejected": WRONG[1:]},
        RIGHT,
        WRONG,
    ),
    "whole conversations": ({"chosen": LONG_RIGHT, "rejected": LONG_WRONG}, LONG_RIGHT, LONG_WRONG),
    "Anthropic's": ({"chosen": f"{HH} 1 2 3", "rejected": f"{HH} 2"}, LONG_RIGHT, LONG_WRONG),
    "a dialogue as prompt": (
        {"prompt": HH.removesuffix("\n\nAssistant:"), "chosen": "1 2 3", "rejected": "2"},
        LONG_RIGHT,
        LONG_WRONG,
    ),
    "a dialogue that opens the answer": (
        {"prompt": HH, "chosen": "1 2 3", "rejected": "2"},
        LONG_RIGHT,
        LONG_WRONG,
    ),
}


def write(path: Path, *records: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


@pytest.mark.parametrize("form", FORMS)
def test_each_form_is_two_conversations(form: str, tmp_path: Path) -> None:
    record, chosen, rejected = FORMS[form]
    (pair,) = read_pairs([write(tmp_path / "a.jsonl", record)])
    assert (pair.chosen, pair.rejected) == (chosen, rejected)
    assert (pair.strength, pair.is_tagged, pair.is_safe) == (NOT_GIVEN, False, (None, None))
    assert pair.place.endswith("a.jsonl: line 1")


def test_what_is_said_of_a_pair_is_kept(tmp_path: Path) -> None:
    record = {"prompt": "Sort 3 1", **ANSWERS, "safety": True, "rejected_safe": False}
    given = [record | {"strength": name} for name in ("Better", " slightly  better ", "unsure")]
    found = [*read_pairs([write(tmp_path / "a.jsonl", *given, record | {"id": 3})])]
    assert [pair.strength for pair in found] == [1, 2, 3, NOT_GIVEN]
    assert all(pair.is_tagged and pair.is_safe == (None, False) for pair in found)
    assert [SPELLINGS[name] for name in STRENGTHS] == [0, 1, 2, 3]


def test_parquet_has_the_same_pairs(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    records = [FORMS["prompt's messages"][0] | {"strength": s} for s in ("better", None)]
    parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "a.parquet")
    found = [*read_pairs([str(tmp_path / "a.parquet")])]
    assert [(p.chosen, p.rejected, p.strength) for p in found] == [
        (RIGHT, WRONG, 1),
        (RIGHT, WRONG, NOT_GIVEN),
    ]
    assert found[1].place.endswith("a.parquet: row 2")


GOOD = {"prompt": "Sort 3 1", **ANSWERS}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "equal": (GOOD | {"rejected": " 1 3 "}, "chosen and rejected are equal; remove the line"),
    "equal dialogues": ({"chosen": f"{HH} 2", "rejected": f"{HH} 2"}, "are equal"),
    "no rejected": ({"prompt": "a", "chosen": "b"}, "holds no rejected answer, but 'prompt', 'ch"),
    "neither": ({"messages": RIGHT}, "holds no chosen and no rejected answer, but 'messages'"),
    "strength": (GOOD | {"strength": "much better"}, "strength is 'much better', not one of"),
    "number": (GOOD | {"strength": 3}, "strength is 3, not one of significantly better"),
    "safety": (GOOD | {"safety": "yes"}, "safety is 'yes', not true or false"),
    "safe": (GOOD | {"chosen_safe": 1}, "chosen_safe is 1, not true or false"),
    "no prompt": (ANSWERS, "chosen is a text and there is no prompt; give one, or a dialogue"),
    "empty": (GOOD | {"rejected": " "}, "rejected is empty"),
    "empty dialogue": ({"chosen": f"{HH} 2", "rejected": HH}, "rejected is empty"),
    "an empty turn": (
        GOOD | {"prompt": "\n\nHuman:  \n\nAssistant: 2\n\nHuman: 3"},
        "prompt is em",
    ),
    "other prompts": (
        {"chosen": RIGHT, "rejected": turns(["Sort 4 1", "1 4"])},
        "do not begin with the same message",
    ),
    "no answer": ({"prompt": ASKED, "chosen": ASKED, "rejected": RIGHT[1:]}, "chosen: message 2"),
    "asks": ({"chosen": MORE, "rejected": RIGHT}, "chosen does not end with an answer of the as"),
    "answer first": ({"prompt": RIGHT, **ANSWERS}, "chosen: message 3 is of role assistant"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_pair_is_refused_by_file_and_line(name: str, tmp_path: Path) -> None:
    record, message = REFUSED[name]
    path = write(tmp_path / "a.jsonl", GOOD, record)
    with pytest.raises(InputError) as refused:
        list(read_pairs([path], "--val-data"))
    assert str(refused.value).startswith(f"--val-data {path}: line 2")
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_keys_that_are_not_used_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    list(read_pairs([write(tmp_path / "a.jsonl", GOOD | {"score": 1, "id": 7})]))
    assert capsys.readouterr().err == "note: --data: keys passed over: id, score\n"
