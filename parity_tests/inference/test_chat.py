"""Conversations: in the terminal, and through the Python interface."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llama_common.errors import InputError
from llama_torch import chat, load
from llama_torch.chat import ChatConfig
from llama_torch.inference.config import LoadConfig, SamplingConfig
from llama_torch.model.config import ModelConfig
from llama_torch.tokenizer.chat_template import ChatTemplate, Llama2Template

from ..backends.torch_model import write_model
from ..support.tokenizers import KINDS, turns


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders_by_kind = {}
    for kind, make in KINDS.items():
        folder = folders_by_kind[kind] = tmp_path_factory.mktemp(kind)
        vocab = 50257 if kind == "gpt2" else 700
        config = ModelConfig(16, 1, 2, 1, 8, 24, vocab, max_seq_len=400)
        write_model(folder, config, seed=1)
        make(folder)
    return folders_by_kind


def run_chat(folder: Path, lines: str, monkeypatch: pytest.MonkeyPatch, *flags: str) -> int:
    """Run the terminal chat on lines of input; return its exit code."""
    remaining = iter(lines.splitlines())

    def read(prompt: str) -> str:
        line = next(remaining, None)
        if line is None:
            raise EOFError
        return line

    monkeypatch.setattr("builtins.input", read)
    return chat.main(["--ckpt", str(folder), "--max-new-tokens", "12", *flags])


def test_the_terminal_chat_remembers_forgets_and_leaves(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[list[str]] = []
    encode = ChatTemplate.encode

    def recording_encode(self: ChatTemplate, messages: list) -> list[int]:
        seen.append([message["content"] for message in messages])
        return encode(self, messages)

    monkeypatch.setattr(ChatTemplate, "encode", recording_encode)
    code = run_chat(
        folders["bytes"], "Hi\n\nMore\n/reset\nNew\n/exit\nno", monkeypatch, "--system", "S"
    )
    assert code == 0
    assert seen[0] == ["S", "Hi"]
    assert (seen[1][:2], len(seen[1]), seen[1][3]) == (["S", "Hi"], 4, "More")
    assert seen[2] == ["S", "New"]
    assert "(forgotten)" in capsys.readouterr().out


def test_a_long_conversation_loses_its_oldest_exchanges(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = "\n".join(f"{i} " + "word " * 20 for i in range(8))
    assert run_chat(folders["bytes"], lines, monkeypatch, "--ignore-eos") == 0
    captured = capsys.readouterr()
    assert "(forgot the oldest" in captured.out
    assert captured.err == ""


@pytest.mark.parametrize(("length", "kept"), [(100, 3), (101, 1)])
def test_a_conversation_that_just_fits_is_kept(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, length: int, kept: int
) -> None:
    """Of 400 tokens a quarter is left for the answer."""
    model = load(folders["bytes"])
    template = SimpleNamespace(encode=lambda messages: [1] * length * len(messages))
    monkeypatch.setitem(vars(model), "chat_template", template)
    conversation = chat.Conversation(model, ChatConfig(LoadConfig(str(folders["bytes"]))))
    messages = turns(["Hi", "Hello", "More"])
    assert conversation._fitting(messages) == (messages[-kept:], [1] * length * kept)


def test_a_refused_message_does_not_end_the_chat(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[int] = []
    encode = Llama2Template.encode

    def recording_encode(self: Llama2Template, messages: list) -> list[int]:
        seen.append(len(messages))
        return encode(self, messages)

    monkeypatch.setattr(Llama2Template, "encode", recording_encode)
    lines = "Hello\n[INST]\n" + "word " * 400 + "\nHi"
    assert run_chat(folders["pieces"], lines, monkeypatch, "--template", "llama2") == 0
    # Earlier exchanges are not dropped for a message that cannot fit anyway.
    assert seen == [1, 3, 3, 1, 3]
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2
    assert "a message contains [INST]" in errors[0]
    assert "the prompt is" in errors[1]


def test_a_checkpoint_without_a_template_is_refused_at_once(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_chat(folders["gpt2"], "Hi", monkeypatch) == 2
    captured = capsys.readouterr()
    assert "has no chat template" in captured.err
    assert captured.out == ""


def test_an_interrupt_ends_the_answer_and_not_the_chat(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = load(folders["bytes"])
    config = ChatConfig(LoadConfig(str(folders["bytes"])))
    conversation = chat.Conversation(model, config)

    def interrupted(*_: Any) -> Any:
        yield "half an"
        raise KeyboardInterrupt

    monkeypatch.setattr(model, "stream_ids", interrupted)
    conversation._exchange("Hi")
    assert conversation.messages[-1] == {"role": "assistant", "content": "half an"}
    assert "half an (interrupted)" in capsys.readouterr().out


def test_chat_and_stream_chat_give_one_answer(folders: dict[str, Path]) -> None:
    model = load(folders["spaced"])
    messages = turns(["Hello"])
    answer = model.chat(messages, max_new_tokens=6, temperature=0.0, ignore_eos=True)
    assert len(answer.tokens) == 6
    streamed = model.stream_chat(messages, max_new_tokens=6, temperature=0.0, ignore_eos=True)
    assert "".join(streamed) == answer.text


def test_several_conversations_have_the_answers_of_each(folders: dict[str, Path]) -> None:
    """On the CPU: a GPU's products over several rows round otherwise."""
    model = load(folders["spaced"], device="cpu")
    conversations = [turns(["Hello"]), turns(["Hello", "Hi", "And you?"])]
    settings: dict[str, Any] = {"max_new_tokens": 6, "temperature": 0.0, "ignore_eos": True}
    found = model.chat_batch(conversations, SamplingConfig(**settings))
    alone = [model.chat(messages, **settings) for messages in conversations]
    assert [answer.text for answer in found] == [answer.text for answer in alone]
    with pytest.raises(InputError, match="2 prompts and 1 settings; give as many"):
        model.chat_batch(conversations, [SamplingConfig()])
