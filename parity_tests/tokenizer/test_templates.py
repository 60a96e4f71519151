"""Templates of the published shapes, and drawn ones: as transformers renders them, and safe."""

# ruff: noqa: RUF001  (a family spells its tokens with wide bars)

import json
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from llama_common.errors import InputError
from llama_torch.tokenizer.chat_template import ChatTemplate
from llama_torch.tokenizer.loading import load_tokenizer
from llama_torch.tokenizer.tokenizer import Tokenizer

from ..support.tokenizers import turns

transformers = pytest.importorskip("transformers")

LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
SPECIAL = (
    *("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|eot_id|>"),
    *("<|start_header_id|>", "<|end_header_id|>", "<start_of_turn>", "<end_of_turn>"),
    *("[INST]", "[/INST]", "<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"),
)


# Written for these tests, each in the manner of a family.
SHAPES = {
    "ChatML": """{% for message in messages %}{% if loop.first and message.role != 'system' %}
{{- '<|im_start|>system\\nYou help.<|im_end|>\\n' }}{% endif %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}""",
    "Llama 3": """{{- '<|begin_of_text|>' }}{% if tools is not none %}{{ 'tools' }}{% endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set told = messages[0]['content'] | trim %}{% set messages = messages[1:] %}
{%- else %}{%- set told = '' %}{% endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' + told + '<|eot_id|>' }}
{%- for message in messages %}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
{{- message['content'] | trim + '<|eot_id|>' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}""",
    "reasoning": """{% set ns = namespace(told='') %}{% for m in messages %}
{%- if m['role'] == 'system' %}{% set ns.told = m['content'] %}{% endif %}{% endfor %}
{{- bos_token }}{{ ns.told }}{% for m in messages %}
{%- if m['role'] == 'user' %}{{ '<｜User｜>' + m['content'] }}{% endif %}
{%- if m['role'] == 'assistant' %}{% set said = m['content'] %}
{%- if '</think>' in said %}{% set said = said.split('</think>')[-1] %}{% endif %}
{{- '<｜Assistant｜>' + said + '</s>' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}""",
    "Gemma": """{{ bos_token }}{% if messages[0]['role'] == 'system' %}
{%- set first = messages[0]['content'] + '\\n\\n' %}{% set rest = messages[1:] %}
{%- else %}{% set first = '' %}{% set rest = messages %}{% endif %}
{%- for message in rest %}
{%- set role = 'model' if message['role'] == 'assistant' else message['role'] %}
{{- '<start_of_turn>' + role + '\\n' + (first if loop.first else '') }}
{{- message['content'] | trim }}{{ '<end_of_turn>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}""",
    "Mistral": """{{ bos_token }}{% for message in messages if message['role'] != 'system' %}
{%- if message['role'] == 'user' %}
{{- '[INST] ' ~ (messages[0]['content'] ~ '\\n\\n' if loop.last and
messages[0]['role'] == 'system' else '') ~ message['content'] ~ ' [/INST]' }}
{%- else %}{{ ' ' + message['content'].strip() + eos_token }}{% endif %}{% endfor %}""",
}


@cache
def both() -> tuple[Tokenizer, Any]:
    """Return a tokenizer of bytes, ours and transformers'; the thoughts' tokens are not special."""
    made = tokenizers.Tokenizer(models.BPE({name: i for i, name in enumerate(LETTERS)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([*SPECIAL[:-2]])
    made.add_tokens([tokenizers.AddedToken(name, normalized=False) for name in SPECIAL[-2:]])
    settings = {"bos_token": "<s>", "eos_token": "</s>"}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
        return load_tokenizer(folder, 999), theirs


def tokenizer() -> Tokenizer:
    return both()[0]


def their_ids(source: str, messages: list[dict[str, str]]) -> list[int]:
    found = both()[1].apply_chat_template(
        messages, chat_template=source, add_generation_prompt=True, return_dict=True
    )
    ids: list[int] = found["input_ids"]
    return ids


def special_ids(ids: list[int]) -> list[int]:
    return [i for i in ids if i >= len(LETTERS)]


harmless = st.text(st.sampled_from("ab \n\t.é🙂'"), max_size=8)
BITS = [*SPECIAL, "<", "<|", "|>", ">", "[", "INST]", "think>", " ", "\n", "a", "🙂"]
spelling = st.lists(st.sampled_from(BITS), max_size=5).map("".join)


@st.composite
def conversations(draw: st.DrawFn, content: st.SearchStrategy[str]) -> list[dict[str, str]]:
    texts = draw(st.lists(content, min_size=1, max_size=3).filter(lambda t: len(t) % 2))
    return turns(texts, draw(st.none() | content))


@pytest.mark.parametrize("shape", SHAPES)
@given(messages=conversations(harmless))
def test_a_published_shape_is_transformers_ids(shape: str, messages: list[dict[str, str]]) -> None:
    own = ChatTemplate(SHAPES[shape], shape, tokenizer())
    assert own.encode(messages) == their_ids(SHAPES[shape], messages)


@pytest.mark.parametrize("shape", SHAPES)
@given(messages=conversations(spelling))
def test_no_message_places_a_special_token(shape: str, messages: list[dict[str, str]]) -> None:
    """The special tokens are those of the same conversation about nothing; the text is whole."""
    own = ChatTemplate(SHAPES[shape], shape, tokenizer())
    ids = own.encode(messages)
    about_nothing = own.encode([message | {"content": "x"} for message in messages])
    assert special_ids(ids) == special_ids(about_nothing)
    if shape == "ChatML":  # which changes no message
        decoded = tokenizer().decode(ids)
        assert all(message["content"] in decoded for message in messages)


@given(thought=harmless, said=harmless)
def test_earlier_thoughts_are_left_out(thought: str, said: str) -> None:
    """The template looks for a token that a message spells, and finds it."""
    messages = turns(["a", f"<think>{thought}</think>{said}", "b"])
    own = ChatTemplate(SHAPES["reasoning"], "reasoning", tokenizer())
    assert own.encode(messages) == their_ids(SHAPES["reasoning"], messages)
    assert own.encode(messages) == own.encode(turns(["a", said, "b"]))


# Drawn templates

said = st.sampled_from(["m", "messages[-1]['content']", "messages[0].content"])
LITERALS = (*SPECIAL[:4], "<|im_", "start|>", "end|>", "<", ">", "a", " ", "")
literal = st.sampled_from(LITERALS).map(repr)
CALLS = [
    *(".strip()", ".upper()", ".lower()", ".split('a')[0]", ".split('>')[-1]", "[1:]", "[::-1]"),
    *(".replace('a', '<s>')", ".replace('<', '')", ".replace('b', m)", ".rstrip('>')"),
    *(" | trim", " | upper", " | list | join('')", " | replace('a', 'b', 1)", " | reverse | join"),
    *(" | default('x')", ".partition('>')[2]", ".splitlines() | join('<s>')", " | string", " * 2"),
    *(" | first | default('y')", ".title()", " | capitalize", " | indent(2)", " | truncate(9)"),
]


def called(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.one_of(
        st.builds(lambda a, call: f"({a}){call}", inner, st.sampled_from(CALLS)),
        st.builds(lambda a, b, sign: f"({a}){sign}({b})", inner, inner, st.sampled_from("+~")),
        st.builds(lambda a, b, c: f"({a} if {b} in m else {c})", inner, literal, inner),
        st.builds(lambda a: f"('%s' | format({a}))", inner),
    )


expressions = st.recursive(said | literal, called, max_leaves=5)


@st.composite
def sources(draw: st.DrawFn) -> str:
    parts = draw(st.lists(expressions, min_size=1, max_size=4))
    between = draw(st.lists(literal, min_size=len(parts), max_size=len(parts)))
    pairs = zip(parts, between, strict=True)
    body = "".join(f"{{{{ {part} }}}}{text[1:-1]}" for part, text in pairs)
    return "{% set m = messages[0]['content'] %}" + body


@given(source=sources(), content=harmless)
def test_a_drawn_template_is_transformers_ids(source: str, content: str) -> None:
    messages = turns([content])
    try:
        ids = ChatTemplate(source, "drawn", tokenizer()).encode(messages)
    except InputError as error:
        # What was not followed spells a special token, or the template fails for them too.
        if "of pieces by an operation" not in str(error):
            with pytest.raises(Exception):  # noqa: B017, PT011
                their_ids(source, messages)
        return
    assert ids == their_ids(source, messages)


@given(source=sources(), content=spelling)
def test_a_drawn_template_lets_no_message_place_a_special_token(source: str, content: str) -> None:
    """A template that holds none places none, whatever it does with a message that spells them."""
    for name in sorted(SPECIAL, key=len, reverse=True):
        source = source.replace(name, "-")
    source = source.replace("<", "(").replace("start|>", "-").replace("end|>", "-")
    try:
        ids = ChatTemplate(source, "drawn", tokenizer()).encode(turns([content]))
    except InputError:
        return
    assert not special_ids(ids)
