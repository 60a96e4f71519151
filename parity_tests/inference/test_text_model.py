"""The Python interface: completions, their finish reasons, and the calls that it refuses."""

import dataclasses
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch

from llama_common.errors import InputError
from llama_torch import SamplingConfig, load
from llama_torch.inference.config import Dtype, Quantize
from llama_torch.inference.text_model import TextModel


@pytest.mark.parametrize(
    "wrong", [{"decoding": "fast"}, {"guesses": 2.5}, {"guesses": "4"}, {"quantize": "int3"}]
)
def test_a_wrong_argument_is_named(wrong: dict[str, Any], model_dir: Path) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        load(model_dir, **wrong)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("kind", "near"), [("int8", 0.05), ("int4", 0.3)])
def test_quantized_logits_are_near(
    kind: Quantize, near: float, dtype: Dtype, model_dir: Path
) -> None:
    plain = load(model_dir, device="cpu", dtype=dtype)
    quantized = load(model_dir, device="cpu", dtype=dtype, quantize=kind)
    tokens = torch.tensor([[464, 2134, 13]])
    logits = [model.model(tokens)[0].float() for model in (plain, quantized)]
    error = (logits[1] - logits[0]).norm() / logits[0].norm()
    assert 0 < error < near
    assert len(quantized.generate("The", max_new_tokens=4).tokens) == 4


def test_the_finish_reason_and_where_the_text_ends(model_dir: Path) -> None:
    model = load(model_dir)
    greedy = {"temperature": 0.0, "max_new_tokens": 6}
    whole = model.generate("The", **greedy)
    assert (len(whole.tokens), whole.finish_reason) == (6, "length")
    assert len(model.generate("The", temperature=0.0).tokens) == 23  # the context holds 24
    third = model.tokenizer.decode([whole.tokens[2].id])
    cut = model.generate("The", stop=(third,), **greedy)
    assert cut.finish_reason == "stop"
    assert cut.text == whole.text[: whole.text.index(third)]
    withheld = model.generate("The", stop=(whole.text[-1] + "?",), **greedy)
    assert withheld.text == whole.text  # the start of a stop text is given out at the end
    by_token = model.generate("The", stop_tokens=(third,), **greedy)
    assert by_token.finish_reason == "stop"
    assert by_token.text == model.tokenizer.decode(token.id for token in by_token.tokens[:-1])
    model.end_ids = {whole.tokens[1].id}
    ended = model.generate("The", **greedy)
    assert ended.finish_reason == "stop"
    assert ended.tokens[-1].id == whole.tokens[1].id
    assert model.generate("The", ignore_eos=True, **greedy).text == whole.text
    assert "".join(model.stream("The", ignore_eos=True, **greedy)) == whole.text
    assert model.generate_batch([], SamplingConfig()) == []


@pytest.fixture(scope="module")
def loaded(model_dir: Path) -> dict[bool, TextModel]:
    """The model alone, and with itself as a draft."""
    return {False: load(model_dir), True: load(model_dir, draft=model_dir, guesses=3)}


@pytest.mark.parametrize("limit", ["max_new_tokens", "the context"])
@pytest.mark.parametrize("stop", ["a text", "a text's end", "a token", "an end token"])
@pytest.mark.parametrize("draft", [False, True])
def test_a_stop_at_the_last_token_allowed_is_a_stop(
    loaded: dict[bool, TextModel],
    monkeypatch: pytest.MonkeyPatch,
    limit: str,
    stop: str,
    draft: bool,
) -> None:
    """Alone and in a batch, streamed or not; one token fewer, and it is the length that ends it."""
    model = loaded[draft]
    prompt, n = ("The", 6) if limit == "max_new_tokens" else ("The" * 18, 6)
    assert limit == "max_new_tokens" or len(model.encode(prompt)) + n == 24
    settings = {"max_new_tokens": n if limit == "max_new_tokens" else 100, "temperature": 1.0}
    for seed in range(100):  # until the last token is letters that do not stand before it
        settings["seed"] = seed
        whole = model.generate(prompt, **settings, ignore_eos=True)
        *_, last = (model.tokenizer.decode([token.id]) for token in whole.tokens)
        if last.strip().isalpha() and last.isascii() and whole.text.count(last) == 1:
            break
    assert (len(whole.tokens), whole.finish_reason) == (n, "length")
    assert whole.text.endswith(last)
    if stop == "an end token":
        monkeypatch.setattr(model, "end_ids", {whole.tokens[-1].id})
    else:
        text = whole.text[-len(last) - 2 :] if stop == "a text's end" else last
        settings["stop_tokens" if stop == "a token" else "stop"] = (text,)
    shown = whole.text[: -len(last) - 2 * (stop == "a text's end")]
    found = [model.generate(prompt, **settings)]
    if not draft:
        each = [SamplingConfig(**settings), SamplingConfig(max_new_tokens=9, ignore_eos=True)]
        found += [model.generate_batch([prompt, "a b"], rows)[0] for rows in (each[:1] * 2, each)]
    for completion in found:
        assert [token.id for token in completion.tokens] == [token.id for token in whole.tokens]
        assert (completion.text, completion.finish_reason) == (shown, "stop")
    assert "".join(model.stream(prompt, **settings)) == shown
    if limit == "max_new_tokens":
        shorter = model.generate(prompt, **settings | {"max_new_tokens": n - 1})
        assert shorter.finish_reason == "length"
        assert shorter.text == whole.text[: -len(last)]


def test_rows_that_end_at_different_times(model_dir: Path) -> None:
    """Rows with their own settings, stop text and length have the tokens that they have alone.

    On the CPU: a GPU's products over several rows round otherwise, which can choose another token.
    """
    model = load(model_dir, device="cpu")
    prompts = ["Hello world, and more", "The", "1 2 3", "a"]
    each = [
        SamplingConfig(max_new_tokens=7, temperature=0.0, logprobs=1),
        SamplingConfig(max_new_tokens=2, seed=3),
        SamplingConfig(max_new_tokens=9, repetition_penalty=1.5, seed=4),
        SamplingConfig(max_new_tokens=9, temperature=0.0),
    ]
    text = model.generate_batch(prompts, each)[3].text
    each[3] = SamplingConfig(max_new_tokens=9, temperature=0.0, stop=(text[3:5],))
    together = model.generate_batch(prompts, each, prefill_chunk=2)
    few = model.generate_batch(prompts, each, max_rows=2)
    assert [one.text for one in few] == [one.text for one in together]
    for prompt, settings, completion in zip(prompts, each, together, strict=True):
        (alone,) = model.generate_batch([prompt], [settings])
        assert (completion.text, completion.finish_reason) == (alone.text, alone.finish_reason)
        assert [token.id for token in completion.tokens] == [token.id for token in alone.tokens]
    assert [len(completion.tokens) for completion in together[:3]] == [7, 2, 9]
    assert together[3].finish_reason == "stop"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.generate("\ud800"), "the prompt is not valid text"),
        (lambda m: m.generate("a", stop=5), "--stop must be texts"),
        (lambda m: m.generate("a", top_k=2.5), "--top-k must be of type int"),
        (lambda m: m.generate("a", temperature="1"), "--temperature must be of type float"),
        (lambda m: m.generate_batch(["a"], []), "1 prompts and 0 settings"),
        (lambda m: m.generate_batch(["a"], SamplingConfig(), 0), "--prefill-chunk must be"),
        (lambda m: m.generate_batch(["a"], SamplingConfig(), max_rows=-1), "--max-rows must be"),
        (lambda m: m.chat("hi"), "has no chat template"),
        (lambda m: load(m.ckpt, dtype="int8"), "dtype 'int8' is not one of"),
        (lambda m: load(m.ckpt, device="tpu"), "device 'tpu' is not one of"),
    ],
)
def test_a_call_that_cannot_be_answered_names_the_reason(
    model_dir: Path, call: Any, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        call(load(model_dir))


def test_one_stop_text_may_stand_alone() -> None:
    assert SamplingConfig(stop="END").stop == ("END",)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["generate", "stream", "chat", "stream_chat"])
def test_every_setting_is_an_argument_with_its_default(name: str) -> None:
    """In SamplingConfig's order, so that none is passed on as another."""
    arguments = inspect.signature(getattr(TextModel, name)).parameters.values()
    found = [(a.name, a.annotation, a.default) for a in arguments if a.kind == a.KEYWORD_ONLY]
    fields = dataclasses.fields(SamplingConfig)
    assert found == [(field.name, field.type, field.default) for field in fields]


@pytest.mark.parametrize("name", ["generate", "stream"])
def test_every_argument_reaches_its_setting(
    name: str, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {
        "max_new_tokens": 2,
        "temperature": 0.5,
        "top_k": 3,
        "top_p": 0.6,
        "min_p": 0.1,
        "repetition_penalty": 1.5,
        "seed": 4,
        "stop": ("a",),
        "stop_tokens": ("b",),
        "ignore_eos": True,
        "logprobs": 5,
    }
    found = []
    model = load(model_dir)
    monkeypatch.setattr(model, "_builder", lambda ids, settings: found.append(settings))
    with pytest.raises(AttributeError):  # nothing is written
        list(getattr(model, name)("The", **given))
    assert found == [SamplingConfig(**given)]
