"""Readers of prompts: the forms that people have, and what is refused by file and line."""

import json
from pathlib import Path
from typing import Any

import pytest

from llama_common.errors import InputError
from llama_torch.rlhf.prompts import load_prompts, read_prompts, tokenise
from llama_torch.tokenizer.chat_template import load_jinja
from llama_torch.tokenizer.tokenizer import Gpt2
from tools.tasks import TasksConfig
from tools.tasks import write as write_tasks

from ..support.tokenizers import turns

ASKED = turns(["Sort 3 1"])
MORE = turns(["Sort 3 1", "1 3", "And 2"])
DIALOGUE = "\n\nHuman: Sort 3 1\n\nAssistant: 1 3\n\nHuman: And 2"
FORMS: dict[str, tuple[dict[str, Any], list[dict[str, str]]]] = {
    "a text": ({"prompt": "Sort 3 1"}, ASKED),
    "a text's messages": ({"prompt": MORE}, MORE),
    "messages": ({"messages": MORE}, MORE),
    "a system message": ({"messages": turns(["a"], "Be brief.")}, turns(["a"], "Be brief.")),
    "a dialogue": ({"prompt": DIALOGUE}, MORE),
    "a dialogue that opens the answer": ({"prompt": f"{DIALOGUE}\n\nAssistant:"}, MORE),
    "a task": ({"messages": ASKED, "answer": "1 3", "kind": "sorting", "turn": 1}, ASKED),
}


def write(path: Path, *records: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


@pytest.mark.parametrize("form", FORMS)
def test_each_form_is_messages_that_end_with_the_users(
    form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record, messages = FORMS[form]
    given = [record, record | {"safety": True}, record | {"safety": False}]
    found = load_prompts([write(tmp_path / "a.jsonl", *given)])
    assert [prompt.messages for prompt in found] == [messages] * 3
    assert [prompt.is_tagged for prompt in found] == [False, True, False]
    assert found[2].place.endswith("a.jsonl: line 3")
    assert capsys.readouterr().err == ""


def test_the_tasks_prompts_are_read(tmp_path: Path) -> None:
    written = TasksConfig(
        str(tmp_path / "tasks"), conversations=0, pairs=0, prompts=20, dialogues=0, held_out=20
    )
    write_tasks(written)
    found = load_prompts([f"{written.out}/prompts.jsonl", f"{written.out}/held-out-prompts.jsonl"])
    assert len(found) == 40
    assert {prompt.is_tagged for prompt in found} == {False, True}


def test_parquet_has_the_same_prompts(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [{"messages": MORE, "safety": True}, {"messages": ASKED, "safety": None}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    found = load_prompts([str(tmp_path / "a.parquet")])
    assert [(p.messages, p.is_tagged) for p in found] == [(MORE, True), (ASKED, False)]
    assert found[1].place.endswith("a.parquet: row 2")


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "nothing": ({"text": "a"}, "holds neither prompt nor messages, but 'text'; give one of"),
    "no key": ({}, "holds neither prompt nor messages, but no key"),
    "both": ({"prompt": "a", "messages": ASKED}, "holds both prompt and messages"),
    "answered": ({"messages": MORE[:2]}, "ends with an answer; a prompt ends with the user's"),
    "system alone": ({"messages": turns([], "a")}, "ends with a message of role system"),
    "order": ({"prompt": [*ASKED, *ASKED]}, "message 2 is of role user, after one of user"),
    "empty": ({"prompt": "  "}, "prompt is empty"),
    "an empty turn": ({"prompt": "\n\nHuman:  \n\nAssistant: a\n\nHuman: b"}, "prompt is empty"),
    "number": ({"prompt": 3}, "is not a list with a message in it"),
    "safety": ({"prompt": "a", "safety": "yes"}, "safety is 'yes', not true or false"),
    "tools": ({"prompt": "a", "tools": [{"name": "f"}]}, "tools holds a list of tools, which is"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_prompt_is_refused_by_file_and_line(name: str, tmp_path: Path) -> None:
    record, message = REFUSED[name]
    path = write(tmp_path / "a.jsonl", {"prompt": "a"}, record)
    with pytest.raises(InputError) as refused:
        list(read_prompts([path]))
    assert str(refused.value).startswith(f"--prompts {path}: line 2")
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_keys_that_are_not_known_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "a.jsonl", {"prompt": "a", "chosen": "b", "id": 7, "kind": "c"})
    assert len(load_prompts([path])) == 1
    assert capsys.readouterr().err == "note: --prompts: keys passed over: chosen, id\n"


def test_a_file_without_prompts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--prompts: holds no prompt"):
        load_prompts([write(tmp_path / "a.jsonl")])


def test_prompts_too_long_for_an_answer_are_left_out(tmp_path: Path) -> None:
    template = load_jinja(tmp_path, Gpt2(), "llama2")
    texts = ["1", " ".join("12345678"), "2"]
    prompts = load_prompts([write(tmp_path / "a.jsonl", *({"prompt": text} for text in texts))])
    ids = [template.encode(prompt.messages) for prompt in prompts]
    assert len(ids[1]) - len(ids[0]) == 7
    found = tokenise(prompts, template, len(ids[1]) + 9, 10)
    assert found == [(prompts[0], ids[0]), (prompts[2], ids[2])]
    assert len(tokenise(prompts, template, len(ids[1]) + 10, 10)) == 3
    with pytest.raises(InputError, match="--max-new-tokens 10: the context of 12 tokens holds no"):
        tokenise(prompts, template, 12, 10)
    tagged = load_prompts([write(tmp_path / "b.jsonl", {"prompt": "a [INST]"})])
    with pytest.raises(InputError, match=r"b.jsonl: line 1: --template llama2: .*contains \[INST"):
        tokenise(tagged, template, 99, 10)
