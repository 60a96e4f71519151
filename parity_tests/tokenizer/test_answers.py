"""Answers in a conversation's tokens: what the template wrote for the assistant, and its end."""

import itertools
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from llama_common.errors import InputError
from llama_torch.tokenizer.answers import answer_segments, spelled
from llama_torch.tokenizer.chat_template import (
    LLAMA2_SOURCE,
    ChatTemplate,
    Llama2Template,
    load_jinja,
)
from llama_torch.tokenizer.tokenizer import Tokenizer
from reference_np.sft import sft_labels

from ..support.tokenizers import turns

OPENED = "{% if add_generation_prompt %}{{ '<|head|>assistant\\n' }}{% endif %}"
TURN = "{{ '<|head|>' + m['role'] + '\\n' + m['content'] + END }}"
EACH = "{% for m in messages %}" + TURN + "{% endfor %}" + OPENED
# Written for these tests, in the manner of the families; and what follows an answer's end token.
TEMPLATES = {
    "ChatML": ("bytes", EACH.replace("END", "'<|end|>\\n'")),
    "Llama 3": (
        "bytes",
        "{{ bos_token }}{% for m in messages %}{{ '<|head|>' + m['role'] + '<|/head|>\\n\\n' + "
        "m['content'] | trim + '<|end|>' }}{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|head|>assistant<|/head|>\\n\\n' }}{% endif %}",
    ),
    # As Phi-3's: one more token behind the last message, where nothing is to be generated.
    "closed": (
        "bytes",
        EACH.replace("END", "'<|/head|>\\n'").removesuffix("{% endif %}")
        + "{% else %}{{ eos_token }}{% endif %}",
    ),
    "Llama 2, JSON": ("spaced", LLAMA2_SOURCE),
    "Llama 2, SentencePiece": ("pieces", LLAMA2_SOURCE),
    "Llama 2, GPT-2": ("gpt2", LLAMA2_SOURCE),
}
# Words: white space at a border is another matter, and Llama 2's form forbids its tags.
words = st.lists(st.sampled_from(["sort", "3 1", "2,", "é漢", "🙂", "<|end|>", "</s>"]), min_size=1)
texts = words.map(" ".join)
conversations = st.lists(texts, min_size=2, max_size=6).map(lambda t: t[: len(t) // 2 * 2])


def template_of(tokenizers: dict[str, Tokenizer], name: str) -> ChatTemplate:
    kind, source = TEMPLATES[name]
    return ChatTemplate(source, name, tokenizers[kind])


@pytest.mark.parametrize("name", TEMPLATES)
@given(said=conversations, system=st.none() | texts)
@example(said=["3 1 2", "1 2 3", "and 0?", "0 1 2 3"], system="Be brief.")
def test_answers_are_learnt_with_their_end_and_nothing_else(
    name: str, tokenizers: dict[str, Tokenizer], said: list[str], system: str | None
) -> None:
    template = template_of(tokenizers, name)
    tokenizer, messages = template.tokenizer, turns(said, system)
    segments = answer_segments(template, messages)
    whole = template.encode(messages, prompts=False)
    assert [i for segment in segments for i in segment.ids] == whole
    ends, done = {"<|end|>", "<|/head|>", "</s>", "<|endoftext|>"}, 0
    answers = iter(said[1::2])
    asked = itertools.count(1 + (system is not None), 2)
    for segment in segments:
        if segment.learnt:
            # What is generated from: the very prompt of the answer stands before it.
            assert whole[:done] == template.encode(messages[: next(asked)])
            assert tokenizer.names[segment.ids[-1]] in ends
            text = tokenizer.decode(segment.ids[:-1])
            assert text.strip() == next(answers)
        done += len(segment.ids)
    assert next(answers, None) is None


@pytest.mark.parametrize("kind", ["spaced", "pieces", "gpt2"])
@given(said=st.lists(texts, min_size=1, max_size=5), system=st.none() | texts)
def test_llama_2s_form_as_a_template_gives_the_ids_of_the_form(
    kind: str, tokenizers: dict[str, Tokenizer], said: list[str], system: str | None
) -> None:
    messages = turns(said[: (len(said) - 1) // 2 * 2 + 1], system)
    as_template = ChatTemplate(LLAMA2_SOURCE, "llama2", tokenizers[kind])
    assert as_template.encode(messages) == Llama2Template(tokenizers[kind]).encode(messages)


@pytest.mark.parametrize(
    "messages",
    [
        turns(["a [/INST] b"]),
        turns(["a"], "<<SYS>>"),
        [*turns(["a"]), *turns(["b"])],
        turns(["a", "b", "c [INST]"]),
    ],
)
def test_what_the_form_refuses_the_template_refuses(
    messages: list[dict[str, str]], tokenizers: dict[str, Tokenizer]
) -> None:
    for template in (
        Llama2Template(tokenizers["spaced"]),
        ChatTemplate(LLAMA2_SOURCE, "llama2", tokenizers["spaced"]),
    ):
        with pytest.raises(InputError):
            template.encode(messages)


SAID = ["Sort 3 1", "1 3", "And 0?", "0 1 3"]
REFUSED = {
    "no end": (
        EACH.replace("END", "'\\n'"),
        SAID,
        "ends answer 1 with '1 3\\n' and no special token, so that a model would never learn",
    ),
    "an end that is text": (
        EACH.replace("END", "'[END]\\n'"),
        SAID,
        "ends answer 1 with '1 3[END]\\n' and no special token",
    ),
    "text behind the end": (
        EACH.replace("END", "'<|end|> next:'"),
        SAID,
        "ends answer 1 with '1 3<|end|> next:' and no special token",
    ),
    "no answer": (
        "{% for m in messages %}{% if m['role'] == 'user' %}" + TURN.replace("END", "'<|end|>'")
        + "{% endif %}{% endfor %}",
        SAID,
        "writes nothing for answer 1, so that there is nothing to learn",
    ),
    "another opening": (
        EACH.replace("END", "'<|end|>\\n'").replace("'<|head|>assistant\\n'", "'<|head|>Bot: '"),
        SAID,
        "opens answer 1 with 'Bot: ' when it is generated and with 'assistant\\n1 3<|end|>",
    ),
    "earlier answers shortened": (
        "{% for m in messages %}{% if m['role'] == 'user' or loop.last %}"
        + TURN.replace("END", "'<|end|>'")
        + "{% else %}{{ '<|head|>assistant\\n...' }}{% endif %}{% endfor %}" + OPENED,
        SAID,
        "writes answer 1 otherwise once messages follow it",
    ),
    "text behind a special token in the last answer alone": (
        "{% for m in messages %}{{ '<|head|>' + m['role'] + '\\n' + m['content'] + '<|/head|>' }}"
        "{% if loop.last and m['role'] == 'assistant' %}{{ 'why' }}{% endif %}{{ '<|end|>' }}"
        "{% endfor %}" + OPENED,
        SAID,
        "writes answer 1 otherwise once messages follow it",
    ),
    "thoughts that are left out later": (
        "{% for m in messages %}{{ '<|head|>' + m['role'] + '\\n' }}"
        "{% if m['role'] == 'assistant' %}{{ '<|/head|>' }}{% if loop.last %}"
        "{{ 'thought<|begin|>' }}{% endif %}{% endif %}{{ m['content'] + '<|end|>' }}"
        "{% endfor %}" + OPENED,
        SAID,
        "writes answer 1 otherwise once messages follow it",
    ),
    "another key of a message": (
        EACH.replace("m['content'] + END", "(m['value'] or '') + '<|end|>'"),
        SAID,
        "writes nothing for answer 1, so that there is nothing to learn; choose another",
    ),
    "white space that joins the answer": (
        EACH.replace("END", "'<|end|>\\n'").replace("\\n' + m", ": ' + m")
        .replace("assistant\\n'", "assistant: '"),
        ["Sort it", "the list"],
        "the end of answer 1's prompt and its own beginning are one token, ' the', which gener",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_template_that_cannot_be_learnt_from_is_refused(
    name: str, tokenizers: dict[str, Tokenizer]
) -> None:
    source, said, message = REFUSED[name]
    template = ChatTemplate(source, "--template t.jinja", tokenizers["bytes"])
    with pytest.raises(InputError) as refused:
        answer_segments(template, turns(said))
    assert message in str(refused.value)


@pytest.mark.parametrize("name", TEMPLATES)
@given(said=conversations, data=st.data())
def test_an_answer_that_is_not_learnt_is_prompt(
    name: str, tokenizers: dict[str, Tokenizer], said: list[str], data: st.DataObject
) -> None:
    """The tokens are the same, and the targets those of the learnt answers alone."""
    template, messages, n = template_of(tokenizers, name), turns(said), len(said) // 2
    learnt = data.draw(st.lists(st.booleans(), min_size=n, max_size=n).filter(any))
    last = n - learnt[::-1].index(True)
    everything = answer_segments(template, messages[: 2 * last])
    found = answer_segments(template, messages, learnt)
    flags = iter(learnt)
    expected = [(ids, is_answer and next(flags)) for ids, is_answer in everything]
    for one, other in zip(sft_labels(found), sft_labels(expected), strict=True):
        assert (one == other).all()


@pytest.mark.parametrize("name", ["earlier answers shortened", "thoughts that are left out later"])
def test_the_last_answer_can_be_learnt_alone_of_a_template_that_shortens_the_others(
    name: str, tokenizers: dict[str, Tokenizer]
) -> None:
    source, said, _ = REFUSED[name]
    template = ChatTemplate(source, "--template t.jinja", tokenizers["bytes"])
    messages = turns(said)
    [prompt, answer] = answer_segments(template, messages, [False, True])
    assert prompt.ids == template.encode(messages[:-1])
    assert (prompt.learnt, answer.learnt) == (False, True)
    assert said[-1] in spelled(template.tokenizer, answer.ids)


def test_a_template_that_reads_the_clock_writes_the_same_every_day(
    tokenizers: dict[str, Tokenizer], tmp_path: Path
) -> None:
    path = tmp_path / "t.jinja"
    path.write_text("{{ strftime_now('%d %b %Y') }}")
    tokenizer = tokenizers["bytes"]
    fixed = load_jinja(tmp_path, tokenizer, str(path), "2024-07-26").encode(turns(["a"]))
    assert spelled(tokenizer, fixed) == "26 Jul 2024"
    assert load_jinja(tmp_path, tokenizer, str(path)).encode(turns(["a"])) != fixed
