"""Ghost Attention: what is drawn with an instruction in every turn is learnt with it in one."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_common.errors import InputError
from llama_torch import gatt, load, sft
from llama_torch.data.conversations import Conversation, read_conversations
from llama_torch.inference.completion import Completion
from llama_torch.inference.config import SamplingConfig
from llama_torch.rlhf import ghost_attention as ghost
from llama_torch.rlhf.dialogues import Draft, Place, messages_of
from llama_torch.tokenizer.answers import answer_segments
from llama_torch.tokenizer.chat_template import load_jinja
from llama_torch.tokenizer.loading import load_tokenizer
from llama_torch.training.labels import labels
from reference_np.sft import gatt_dialogue, sft_labels
from tools.synthetic import records
from tools.synthetic.tasks import FORMS

from ..support.model_directories import CONFIGS, write_model
from ..support.tokenizers import turns

TOLD = "Speak as a cat."
N = 12


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model, one token in five of which ends an answer."""
    folder = tmp_path_factory.mktemp("model")
    write_model(folder, "bytes")
    ends = list(range(1, CONFIGS["bytes"].vocab_size, 5))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    return folder


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Conversations of one to three questions."""
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    said = [[f"{word} {i}?" for word in ("How", "no", "And", "no", "Why")] for i in range(N)]
    lines = [turns(texts[: 2 * (i % 3) + 1], "Be brief.") for i, texts in enumerate(said)]
    path.write_text("".join(json.dumps({"messages": one}) + "\n" for one in lines))
    return path


@pytest.fixture
def flags(model: Path, prompts: Path, tmp_path: Path) -> list[str]:
    told = tmp_path / "told.txt"
    told.write_text(f"\n  {TOLD}\n\n")
    given = ["--model", str(model), "--prompts", str(prompts), "--instructions", str(told)]
    return [*given, "--temperature", "2", "--top-p", "1", "--max-new-tokens", "12"]


def written(flags: list[str], out: Path, *more: str) -> list[Conversation]:
    """Run the command; return the conversations that it writes, as sft reads them."""
    assert gatt.main([*flags, "--dtype", "float64", "--out", str(out), *more]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["conversations.jsonl", "gatt.json"]
    found = [*read_conversations([str(out / "conversations.jsonl")])]
    counts = json.loads((out / "gatt.json").read_text())
    assert counts["dialogues"] == len(found) > 1
    assert counts["dialogues"] + sum(counts["dropped"].values()) == N
    return found


def test_what_is_written_has_the_oracles_labels(
    model: Path, flags: list[str], tmp_path: Path
) -> None:
    """Through the real template: the last answer and its end are learnt, and nothing else."""
    tokenizer = load_tokenizer(model, CONFIGS["bytes"].vocab_size)
    template = load_jinja(model, tokenizer)
    for one in written(flags, tmp_path / "out", "--place", "user"):
        texts = [message["content"] for message in one.messages]
        first = texts[0].removeprefix(TOLD + "\n")
        exchanges = list(zip([first, *texts[2::2]], texts[1::2], strict=True))
        expected = gatt_dialogue(TOLD + "\n", exchanges)
        assert [text for text, _ in expected] == texts
        segments, done = [], 0
        for i, (_, learnt) in enumerate(expected):
            ids = template.encode(one.messages[: i + 1], prompts=i % 2 == 0)
            segments.append((ids[done:], learnt))
            done = len(ids)
        found = labels(answer_segments(template, one.messages, one.learnt))
        for ours, oracles in zip(found, sft_labels(segments), strict=True):
            assert (ours == oracles).all()
        learnt_ids = found[1][found[1] >= 0].tolist()
        assert learnt_ids[-1] == tokenizer.special["<|end|>"]
        assert tokenizer.decode(learnt_ids[:-1]).strip() == texts[-1]


@pytest.mark.parametrize("place", ["system", "user"])
def test_the_instruction_stands_in_the_beginning_alone(
    flags: list[str], tmp_path: Path, place: str
) -> None:
    for one in written(flags, tmp_path / "out", "--place", place):
        first, *rest = one.messages
        assert (first["role"] == "system") == (place == "system")
        assert first["content"].startswith(TOLD)
        assert all(TOLD not in message["content"] for message in rest if message["role"] == "user")
        assert one.learnt == [False] * (len(one.learnt) - 1) + [True]
        assert "Be brief." not in [message["content"] for message in one.messages]


def test_a_seed_decides_all_whatever_is_drawn_together(flags: list[str], tmp_path: Path) -> None:
    one, other, third = (
        written(flags, tmp_path / name, *more)
        for name, more in (
            ("a", ()),
            ("b", ("--rows", "5")),
            ("c", ("--seed", "1")),
        )
    )
    assert [c.messages for c in one] == [c.messages for c in other]
    assert [c.messages for c in one] != [c.messages for c in third]


def test_sft_learns_from_what_is_written(
    model: Path, flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    written(flags, out)
    said = capsys.readouterr().out
    data = out / "conversations.jsonl"
    assert f"next:\n  python -m llama_torch.sft --init-from {model} --data {data}" in said
    small = ["--batch-size", "2", "--grad-accum", "1", "--max-seq-len", "100", "--device", "cpu"]
    assert sft.main(["--init-from", str(model), "--data", str(data), *small, "--dry-run"]) == 0


# The sampling, with a model that is asked and answers as told.


class Told:
    """In place of a TextModel: answers in order, and keeps what it was asked."""

    def __init__(self, model: Path, answers: Sequence[tuple[str, Any]], context: int = 10**6):
        self.chat_template = load(model).chat_template
        self.answers, self.asked, self.seeds = list(answers), [], []  # type: ignore[var-annotated]
        self.model = SimpleNamespace(config=SimpleNamespace(max_seq_len=context))

    def chat_batch(
        self, conversations: Any, settings: list[SamplingConfig], max_rows: int
    ) -> list[Completion]:
        assert max_rows == 8
        self.asked += conversations
        self.seeds += [each.seed for each in settings]
        return [Completion(text, (), why) for text, why in map(self._next, conversations)]

    def _next(self, _: Any) -> tuple[str, Any]:
        return self.answers.pop(0)


def sampled(
    told: Told, questions: list[list[str]], place: Place = "user"
) -> tuple[list[list[str]], dict[str, int]]:
    """Return the answers of the dialogues that are not dropped, and why others are."""
    sampler = ghost.Sampler(told, SamplingConfig(), place)  # type: ignore[arg-type]
    drafts = [Draft(i, TOLD, TOLD, own) for i, own in enumerate(questions)]
    *_, dialogues = sampler.sample(drafts, 8)
    return [dialogue.answers for dialogue in dialogues], dict(sampler.dropped)


@pytest.mark.parametrize("place", ["system", "user"])
def test_answers_are_drawn_with_the_instruction_in_every_user_message(
    model: Path, place: Place
) -> None:
    told = Told(model, [(text, "stop") for text in (" a1", "b1 ", "a2", "a3")])
    found, dropped = sampled(told, [["q1", "q2", "q3"], ["r1"]], place)
    assert (found, dropped) == ([["a1", "a2", "a3"], ["b1"]], {})
    system = turns([], TOLD) if place == "system" else []
    first = "q1" if place == "system" else f"{TOLD}\nq1"
    assert told.asked[-1] == system + turns([first, "a1", f"{TOLD}\nq2", "a2", f"{TOLD}\nq3"])
    assert len(set(told.seeds)) == 4


def test_the_terser_instruction_is_learnt_in_place_of_the_one_drawn_with(model: Path) -> None:
    told = Told(model, [("a", "stop"), ("b", "stop")])
    sampler = ghost.Sampler(told, SamplingConfig(), "system")  # type: ignore[arg-type]
    *_, [dialogue] = sampler.sample([Draft(0, TOLD, "Figure: cat.", ["q", "r"])], 8)
    assert all("Figure" not in m["content"] for asked in told.asked for m in asked)
    system, q, a, r, b = turns(["q", "a", "r", "b"], "Figure: cat.")
    expected = [system, q, a | {"weight": 0}, r, b | {"weight": 1}]
    assert ghost.taught(dialogue, "system") == {"messages": expected}


def test_a_dialogue_is_given_up_for_an_answer_that_must_not_be_learnt(model: Path) -> None:
    answers = [("a", "stop"), ("a", "length"), (" ", "stop"), ("a b", "stop")]
    found, dropped = sampled(Told(model, [*answers, ("b", "stop")]), [["q"]] * 3 + [["q", "r"]])
    assert found == [["a"], ["a b", "b"]]
    assert dropped == {
        "an answer does not end within --max-new-tokens": 1,
        "an answer is empty": 1,
    }


def test_a_dialogue_is_given_up_where_it_cannot_go_on(model: Path) -> None:
    """Its own answer fills the context, or spells what the template forbids."""
    found, dropped = sampled(Told(model, [("a" * 200, "stop")], 100), [["q", "r"]])
    assert (found, dropped) == ([], {"it is longer than the context": 1})
    told = Told(model, [("[INST]", "stop"), ("b", "stop"), ("c", "stop")])
    told.chat_template = _forbidding()
    found, dropped = sampled(told, [["q", "r"], ["s", "t"]])
    assert found == [["b", "c"]]
    assert dropped == {"a message contains [INST]": 1}
    with pytest.raises(InputError, match="contains"):  # the user's own
        sampled(told, [["[INST]"]])


def _forbidding() -> Any:
    def encode(messages: Any) -> list[int]:
        if any("[INST]" in message["content"] for message in messages):
            raise InputError("a message contains [INST]")
        return [1]

    return SimpleNamespace(encode=encode)


# Questions


@given(st.lists(st.lists(st.text(max_size=2), min_size=1, max_size=5)), st.integers(1, 4))
def test_dialogues_have_as_many_turns_as_asked(questions: list[list[str]], n: int) -> None:
    found = ghost.of_length(questions, n)
    assert all(len(own) == n for own in found)
    assert ghost.of_length(questions, 0) == questions
    # Each begins where a conversation does, and no question is asked twice.
    flat = iter(questions)
    for own in found:
        taken = list(next(flat))
        while len(taken) < n:
            taken += next(flat)
        assert own == taken[:n]


RECORDS: list[tuple[Any, list[str]]] = [
    ({"messages": turns(["a", "b", "c", "d"], "x"), "form": "y"}, ["a", "c"]),
    ({"messages": [*turns(["a"]), turns(["", "b"])[1] | {"weight": 0}]}, ["a"]),
    ({"messages": [*turns(["a"]), *turns(["b"])]}, ["a", "b"]),
    ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, ["a"]),
    ({"prompt": "a", "completion": "b"}, ["a"]),
    ({"prompt": turns(["a", "b", "c"]), "chosen": "d", "rejected": "e"}, ["a", "c"]),
]


@pytest.mark.parametrize(("record", "questions"), RECORDS)
def test_the_users_messages_of_any_record_are_asked(
    record: Any, questions: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(record))
    assert ghost.read_questions([str(path)]) == [questions]


def test_the_tasks_put_a_form_where_gatt_does() -> None:
    """A model that learnt forms from tools/tasks.py --form-in user meets the same tokens."""
    form = FORMS[0].instruction
    for place in ("system", "user"):
        asked = records.instructed(form, ["a"], place)
        assert asked == messages_of(form, ["a"], [], place, True)
    drawn = list(records.conversations(random.Random(0), 20, 1, False, "user"))
    assert any(record["messages"][0]["content"].startswith(form + "\n") for record in drawn)
