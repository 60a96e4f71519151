"""What python -m llama_torch.gatt is given: instructions, and what is refused in one line."""

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_common.errors import InputError
from llama_torch import gatt
from llama_torch.rlhf.instructions import Instruction, draw_instruction, read_instructions

from ..support.model_directories import without_ends, write_model

KNOWN = [Instruction("Speak as a cat.", "Figure: cat."), Instruction("Rhyme.", ""), *()]


def test_instructions_are_lines_or_records(tmp_path: Path) -> None:
    lines, table = tmp_path / "a.txt", tmp_path / "a.jsonl"
    lines.write_text("\ufeffSpeak as a cat.\r\n\n  Rhyme.  \n", encoding="utf-8")
    assert read_instructions(str(lines)) == [Instruction(one.text, "") for one in KNOWN]
    given = [
        {"instruction": " Speak as a cat.", "short": "Figure: cat.\n"},
        {"instruction": "Rhyme."},
    ]
    table.write_text("".join(json.dumps(one) + "\n" for one in given))
    assert read_instructions(str(table)) == KNOWN


@given(seed=st.integers(0, 2**32))
def test_one_instruction_is_terser_or_as_it_is(seed: int) -> None:
    text, learnt = draw_instruction(random.Random(seed), KNOWN, 1)
    assert (text, learnt) in [
        ("Rhyme.", "Rhyme."),
        ("Speak as a cat.", "Speak as a cat."),
        ("Speak as a cat.", "Figure: cat."),
    ]


def test_instructions_are_combined_and_half_of_them_terser() -> None:
    """As many of one as of two; no instruction twice; 4 standard errors about a half."""
    n = 1000
    drawn = Counter(draw_instruction(random.Random(i), KNOWN, 5) for i in range(n))
    texts = Counter(text for text, _ in drawn.elements())
    joined = ["Speak as a cat. Rhyme.", "Rhyme. Speak as a cat."]
    assert texts.keys() == {"Speak as a cat.", "Rhyme.", *joined}
    assert abs(sum(texts[text] for text in joined) / n - 0.5) < 4 * 0.5 / n**0.5
    terse = [learnt != text for text, learnt in drawn.elements() if "cat" in text]
    assert abs(sum(terse) / len(terse) - 0.5) < 4 * 0.5 / len(terse) ** 0.5
    assert all("Rhyme." in learnt for text, learnt in drawn if "Rhyme." in text)


BAD_RECORDS: list[tuple[Any, str]] = [
    ({"instruction": " "}, "instruction is missing or empty; correct the line"),
    ({"short": "a"}, "instruction is missing or empty"),
    ({"instruction": "a", "short": 1}, "short is 1, no text"),
    ({"instruction": "\ud83d"}, "instruction is '\\ud83d', no text"),
    ({"instruction": "a", "weight": 1}, "key 'weight' is not known; an instruction has instr"),
    ([1], "is not a JSON object; fix the line"),
]


@pytest.mark.parametrize(("record", "message"), BAD_RECORDS)
def test_a_record_that_is_no_instruction_is_refused(
    record: Any, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"instruction": "a"}\n' + json.dumps(record))
    with pytest.raises(InputError) as refused:
        read_instructions(str(path))
    assert str(refused.value).startswith(f"--instructions {path}: line 2")
    assert message in str(refused.value)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_model(folder, "bytes")
    return folder


WRONG = {
    "a folder that is there": (["--out", "{here}"], "--out {here}: is there already; name a new"),
    "no prompts": (["--prompts", "{here}/none.jsonl"], "none.jsonl: no file found"),
    "a bad prompt": (["--prompts", "{here}/bad.jsonl"], "bad.jsonl: line 1 holds no messages, c"),
    "no user": (["--prompts", "{here}/mute.jsonl"], "mute.jsonl: line 1: holds no message of the"),
    "empty prompts": (["--prompts", "{here}/empty.jsonl"], "--prompts: holds no conversation; na"),
    "no instructions": (["--instructions", "{here}/none.txt"], "none.txt: cannot be read ("),
    "bytes": (["--instructions", "{here}/bytes.txt"], "bytes.txt: cannot be read ('utf-8' codec"),
    "none in it": (["--instructions", "{here}/empty.jsonl"], "holds no instruction; write one a"),
    "too few questions": (["--turns", "3"], "--turns 3: --prompts holds fewer messages of the u"),
    "no template": (["--template", "{here}/t.jinja"], "t.jinja: no such file; give a Jinja file"),
    "no model": (["--model", "{here}/none"], "none: no such file"),
    "negative turns": (["--turns", "-1"], "--turns must lie between 0 and 2^31 - 1, got -1"),
    "a temperature": (["--temperature", "-1"], "--temperature must be zero (greedy) or positive"),
    "another place": (["--place", "last"], "--place last: not one of system, user"),
    "all dropped": (["--max-new-tokens", "1"], "all dialogues are dropped, 2 since an answer d"),
    "a device": (["--out", "/dev/null/out"], "--out /dev/null/out cannot be written below /dev/n"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_one_line_and_nothing_is_written(
    name: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more, message = WRONG[name]
    files = {
        "good.jsonl": b'{"prompt": "a"}\n{"prompt": "b"}',
        "bad.jsonl": b'{"text": "a"}',
        "mute.jsonl": b'{"messages": [{"role": "assistant", "content": "a"}]}',
        "empty.jsonl": b"",
        "told.txt": b"Rhyme.",
        "bytes.txt": b"\xff\xfe",
    }
    for file, content in files.items():
        (tmp_path / file).write_bytes(content)
    flags = {
        "--model": str(model),
        "--prompts": f"{tmp_path}/good.jsonl",
        "--instructions": f"{tmp_path}/told.txt",
        "--out": f"{tmp_path}/new/out",
    }
    flags |= {more[0]: more[1].format(here=tmp_path)}
    assert gatt.main([part for pair in flags.items() for part in pair]) == 2
    lines = capsys.readouterr().err.splitlines()
    [error] = [line for line in lines if not line.startswith("note: ")]
    assert error.startswith("error: ")
    assert message.format(here=tmp_path) in error
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(files)


def test_no_answer_is_drawn_where_none_can_be_written(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file in the folder's way was told after all dialogues were drawn."""
    for name in ("told.txt", "good.jsonl"):
        (tmp_path / name).write_text('{"prompt": "a"}')
    given = ["--prompts", f"{tmp_path}/good.jsonl", "--instructions", f"{tmp_path}/told.txt"]
    out = str(tmp_path / "told.txt" / "out")
    assert gatt.main(["--model", str(model), *given, "--out", out]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert f"error: --out {out} cannot be written below {tmp_path}/told.txt; choose" in said.err


def test_a_model_whose_answers_never_end_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    endless = without_ends(tmp_path / "model")
    for name in ("told.txt", "good.jsonl"):
        (tmp_path / name).write_text('{"prompt": "a"}')
    given = ["--prompts", f"{tmp_path}/good.jsonl", "--instructions", f"{tmp_path}/told.txt"]
    assert gatt.main(["--model", str(endless), *given, "--out", f"{tmp_path}/out"]) == 2
    assert f"error: --model {endless}: names no end token" in capsys.readouterr().err


def test_the_next_command_can_be_typed(model: Path, tmp_path: Path) -> None:
    config = gatt.GattConfig("my model", ("a",), "b", "my out", template="my template")
    [*_, said] = gatt._summary(config, Counter({1: 1}), Counter())
    words = "--init-from 'my model' --template 'my template' --data 'my out/conversations.jsonl'"
    assert said == f"next:\n  python -m llama_torch.sft {words}"
