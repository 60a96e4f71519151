"""Readers of conversations: the forms that people have, and what is refused by file and line."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from llama_common.errors import InputError
from llama_torch.data.conversations import read_conversations

ASKED = {"role": "user", "content": "Sort 3 1"}
ANSWERED = {"role": "assistant", "content": "1 3"}
TOLD = {"role": "system", "content": "Be brief."}
MESSAGES = [TOLD, ASKED, ANSWERED]
FORMS: dict[str, tuple[dict[str, Any], list[dict[str, str]]]] = {
    "messages": ({"messages": MESSAGES, "id": 7}, MESSAGES),
    "prompt and completion": ({"prompt": "Sort 3 1", "completion": "1 3"}, [ASKED, ANSWERED]),
    "ShareGPT": (
        {
            "conversations": [
                {"from": "system", "value": "Be brief."},
                {"from": "human", "value": "Sort 3 1"},
                {"from": "gpt", "value": "1 3"},
            ]
        },
        MESSAGES,
    ),
    "ShareGPT with its system": (
        {
            "system": "Be brief.",
            "conversations": [
                {"from": "human", "value": "Sort 3 1"},
                {"from": "gpt", "value": "1 3"},
            ],
        },
        MESSAGES,
    ),
    "no system": ({"messages": [TOLD | {"content": ""}, ASKED, ANSWERED]}, [ASKED, ANSWERED]),
    "asked again": ({"messages": [*MESSAGES, ASKED]}, MESSAGES),
    "tools' answers": (
        {"messages": [ASKED, ANSWERED, {"role": "tool", "content": "[1, 3]"}, ANSWERED]},
        [ASKED, ANSWERED, {"role": "tool", "content": "[1, 3]"}, ANSWERED],
    ),
}


def write(path: Path, records: list[dict[str, Any]]) -> str:
    """Write records in the format of the path's ending; return it."""
    lines = "".join(json.dumps(record) + "\n" for record in records)
    if path.suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(records), path)
    else:
        path.write_bytes(gzip.compress(lines.encode()) if path.suffix == ".gz" else lines.encode())
    return str(path)


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".parquet"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_read(form: str, ending: str, tmp_path: Path) -> None:
    record, expected = FORMS[form]
    name = write(tmp_path / f"a{ending}", [record, record])
    place = "row" if ending == ".parquet" else "line"
    found = [*read_conversations([name])]
    assert [one.messages for one in found] == [expected] * 2
    assert [one.place for one in found] == [f"--data {name}: {place} {n}" for n in (1, 2)]


UNLEARNT = ANSWERED | {"weight": 0}
WEIGHED: list[tuple[dict[str, Any], list[bool]]] = [
    ({"messages": [*MESSAGES, ASKED, ANSWERED]}, [True, True]),
    ({"messages": [TOLD, ASKED, UNLEARNT, ASKED, ANSWERED | {"weight": 1}]}, [False, True]),
    ({"messages": [ASKED, UNLEARNT, ASKED, ANSWERED]}, [False, True]),
    ({"messages": [ASKED, ANSWERED | {"weight": None}, ASKED, ANSWERED]}, [True, True]),
    ({"messages": [ASKED, UNLEARNT, ASKED, ANSWERED | {"weight": 1.0}]}, [False, True]),
    ({"messages": [ASKED, ANSWERED, ASKED, UNLEARNT, ASKED, UNLEARNT]}, [True]),
    ({"messages": [ASKED, UNLEARNT, ASKED, ANSWERED, ASKED, UNLEARNT]}, [False, True]),
    (
        {
            "conversations": [
                {"from": "human", "value": "a"},
                {"from": "gpt", "value": "b", "weight": 0},
                {"from": "human", "value": "c"},
                {"from": "gpt", "value": "d"},
            ]
        },
        [False, True],
    ),
    ({"prompt": "a", "completion": "b"}, [True]),
]


@pytest.mark.parametrize("ending", [".jsonl", ".parquet"])
@pytest.mark.parametrize(("record", "learnt"), WEIGHED)
def test_an_answer_of_weight_0_is_not_learnt(
    record: dict[str, Any], learnt: list[bool], ending: str, tmp_path: Path
) -> None:
    """Nor is what follows the last answer that is; a template sees no weight."""
    [found] = read_conversations([write(tmp_path / f"a{ending}", [record])])
    assert found.learnt == learnt
    assert found.messages[-1]["role"] == "assistant"
    assert sum(message["role"] == "assistant" for message in found.messages) == len(learnt)
    assert all(message.keys() == {"role", "content"} for message in found.messages)
    answers = [i for i, m in enumerate(found.messages) if m["role"] == "assistant"]
    assert len(found.first_prompt) == answers[learnt.index(True)]


def test_keys_that_are_passed_over_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = {"messages": MESSAGES, "source": "x", "prompt": "y"}
    name = write(tmp_path / "kept.jsonl", [record])
    list(read_conversations([name], "--val-data"))
    assert "note: --val-data: keys passed over: prompt, source\n" in capsys.readouterr().err


REFUSED: list[tuple[Any, str]] = [
    ({"messages": [ASKED]}, ": holds no answer of the assistant; remove the line"),
    ({"messages": [ANSWERED, ASKED]}, ": message 1 is of role assistant, the first; there must "),
    ({"messages": [ASKED, ASKED, ANSWERED]}, ": message 2 is of role user, after one of user; "),
    ({"messages": [ASKED, ANSWERED, ANSWERED]}, ": message 3 is of role assistant, after one of "),
    ({"messages": [ASKED, TOLD, ANSWERED]}, ": message 2 is of role system, after one of user; "),
    ({"messages": [ASKED, ANSWERED | {"content": " \n"}]}, ": message 2 is empty; fill it, or "),
    ({"messages": [ASKED | {"content": ""}, ANSWERED]}, ": message 1 is empty; fill it, or "),
    ({"messages": [ASKED, ANSWERED | {"content": None}]}, ": message 2 has content of type None"),
    ({"messages": [ASKED | {"content": ["a"]}, ANSWERED]}, ": message 1 has content of type list"),
    (
        {"messages": [ASKED, ANSWERED | {"content": "\ud83d"}]},
        ": message 2 has content of type text with half a character",
    ),
    (
        {"messages": [ASKED, ANSWERED | {"tool_calls": [1]}]},
        ": message 2: key 'tool_calls' is not known, and what it changes would be lost; remove it",
    ),
    (
        {"messages": [ASKED, UNLEARNT, ASKED, UNLEARNT]},
        ": every answer has weight 0, so that there is nothing to learn; give one weight 1, or rem",
    ),
    (
        {"messages": [ASKED | {"weight": 1}, ANSWERED]},
        ": message 1: has a weight, which answers alone have: no other message is learnt; remove i",
    ),
    *(
        (
            {"messages": [ASKED, ANSWERED | {"weight": weight}]},
            f": message 2: weight is {said}, neither 0 (not learnt) nor 1; correct it",
        )
        for weight, said in ((2, "2"), (0.5, "0.5"), (True, "True"), ("1", "'1'"), ([], "[]"))
    ),
    (
        {"conversations": [ASKED, ANSWERED]},
        ": message 1: 'role' and 'content' are the keys of another form; here they are 'from' and "
        "'value': rename them",
    ),
    (
        {"messages": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        ": message 1: 'from' and 'value' are the keys of another form; here they are 'role' and ",
    ),
    ({"messages": [ASKED | {"role": "bot"}]}, ": message 1: role is 'bot', not one of system, "),
    ({"messages": [ASKED | {"role": ["user"]}]}, ": message 1: role is ['user'], not one of "),
    ({"conversations": [{"from": "bing", "value": "a"}]}, ": message 1: from is 'bing', not one "),
    ({"messages": []}, " is not a list with a message in it; remove or correct the line"),
    ({"messages": "Hi"}, " is not a list with a message in it"),
    ({"messages": ["Hi"]}, ": message 1 is no object with 'role' and 'content'; correct it"),
    ({"prompt": "a", "completion": ""}, ": completion is empty; fill it, or remove the line"),
    ({"prompt": [ASKED], "completion": "a"}, ": prompt has content of type list; give valid text"),
    ({"text": "a", "id": 1}, " holds no messages, conversations (ShareGPT's), or prompt and compl"),
    ({"messages": MESSAGES, "tools": [{}]}, ": tools holds a list of tools, which is not support"),
    ({"chosen": "a", "rejected": "b"}, ": chosen holds a pair of answers, which a reward model le"),
    ({}, " holds no messages, conversations (ShareGPT's), or prompt and completion, but no key;"),
    ([1], " is not a JSON object; fix the line"),
]


@pytest.mark.parametrize(("record", "message"), REFUSED)
def test_a_bad_line_is_refused_by_file_and_line(record: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    lines = ["\ufeff" + json.dumps({"messages": MESSAGES}), "", json.dumps(record)]
    path.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(InputError) as refused:
        list(read_conversations([str(path)]))
    said = str(refused.value)
    assert said.startswith(f"--data {path}: line 3{message.partition(';')[0][:3]}")
    assert message in said
    assert "\n" not in said


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"messages": [', "line 1 is not a JSON object"),
        ("a.jsonl", b"[" * 100_000, "line 1 is not a JSON object"),
        ("a.jsonl", b'{"prompt": "\xff"}', "line 1 cannot be read as UTF-8"),
        ("a.jsonl.gz", b"no gzip", "cannot be decompressed"),
        ("a.parquet", b"no parquet", "not a parquet file that can be read"),
        ("a.txt", b"text", "is not .jsonl or .parquet; leave it out"),
    ],
)
def test_a_bad_file_is_refused(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError) as refused:
        list(read_conversations([str(path)], "--val-data"))
    assert str(refused.value).startswith(f"--val-data {path}: {message}")


def test_a_date_beyond_pythons_is_refused_by_file_and_row(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    times = pyarrow.array([2**62], pyarrow.timestamp("us"))
    table = pyarrow.table({"prompt": ["a"], "completion": ["b"], "at": times})
    path = tmp_path / "a.parquet"
    pytest.importorskip("pyarrow.parquet").write_table(table, path)
    with pytest.raises(InputError) as refused:
        list(read_conversations([str(path)]))
    said = f"--data {path}: a value of the rows from 1 on cannot be read (date value out of range)"
    assert str(refused.value).startswith(said)
