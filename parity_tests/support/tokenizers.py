"""Train small tokenizers of the three kinds, as the tests download nothing."""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import sentencepiece
import tokenizers
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from llama_torch.tokenizer import gpt2

TEXT = [topics[name] for name in sorted(topics)[:40]]
SPECIALS = ("<|begin|>", "<|end|>", "<|head|>", "<|/head|>")
LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
SPELLED = [*SPECIALS, "<s>", "</s>", "<unk>", "<|endoftext|>"]
pieces = st.one_of(
    st.text(max_size=8),
    st.sampled_from([" ", "  ", "\n\n", "the ", "1234", "é漢字", "🙂\u200d🙂", "don't", *SPELLED]),
)
texts = st.lists(pieces, max_size=6).map("".join)  # which spell special tokens, too

# Chat templates written for these tests, in the manner of the published ones.
HEADED = """{{ bos_token }}{% for message in messages %}\
{{ '<|head|>' + message['role'] + '<|/head|>\\n\\n' + message['content'] | trim + '<|end|>' }}\
{% endfor %}{% if add_generation_prompt %}{{ '<|head|>assistant<|/head|>\\n\\n' }}{% endif %}"""
BRACKETED = """{% if messages[0]['role'] == 'system' %}
{% set rest = messages[1:] %}
{% set told = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}
{% else %}{% set rest = messages %}{% set told = '' %}{% endif %}
{% for message in rest %}
    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('the roles must alternate') }}
{% endif %}
{% set content = told + message['content'] if loop.first else message['content'] %}
{% if message['role'] == 'user' %}
{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}
{% else %}
{{ ' ' + content.strip() + ' ' + eos_token }}
{% endif %}
{% endfor %}"""


def turns(texts: list[str], system: str | None = None) -> list[dict[str, str]]:
    """Return a conversation: user and assistant in turn, after a system text if there is one."""
    roles = ["user", "assistant"] * len(texts)
    messages = [{"role": r, "content": t} for r, t in zip(roles, texts, strict=False)]
    return messages if system is None else [{"role": "system", "content": system}, *messages]


def write_settings(folder: Path, **settings: Any) -> None:
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **settings}
    settings["clean_up_tokenization_spaces"] = False
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def byte_level(folder: Path) -> Path:
    """Write a tokenizer.json in the manner of Llama 3's: bytes, and a BOS put first."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=alphabet, show_progress=False, special_tokens=[*SPECIALS]
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", tokenizer.token_to_id("<|begin|>"))]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    write_settings(folder, bos_token="<|begin|>", eos_token="<|end|>", chat_template=HEADED)
    return folder


def spaced(folder: Path) -> Path:
    """Write a tokenizer.json in the manner of Llama 2's: a word's space in front, bytes at need."""
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=400, limit_alphabet=90, show_progress=False)
    tokenizer.train_from_iterator(TEXT, trainer)
    content = json.loads(tokenizer.to_str())
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    names += [name for name in content["model"]["vocab"] if name not in names]
    content["model"]["vocab"] = {name: i for i, name in enumerate(names)}
    content["model"] |= {"byte_fallback": True, "fuse_unk": True, "unk_token": "<unk>"}
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(content | {"pre_tokenizer": None}))
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    space = "\u2581"
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend(space), normalizers.Replace(" ", space)]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(space, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    write_settings(folder, bos_token="<s>", eos_token="</s>", chat_template=BRACKETED)
    return folder


def pieces_model(user_defined: Sequence[str] = (), control: Sequence[str] = ()) -> bytes:
    """Train a tokenizer.model of 400 pieces as Llama 2's was; return the file's bytes."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for text in TEXT for line in text.splitlines()),
        model_writer=model,
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        character_coverage=0.99,
        minloglevel=2,
        user_defined_symbols=list(user_defined),
        control_symbols=list(control),
    )
    return model.getvalue()


def sentence_piece(folder: Path) -> Path:
    """Write a tokenizer.model, trained as Llama 2's was."""
    (folder / "tokenizer.model").write_bytes(pieces_model())
    write_settings(folder, bos_token="<s>", eos_token="</s>", chat_template=BRACKETED)
    return folder


def gpt2_files(folder: Path) -> Path:
    """Write the files of a run directory."""
    for name, text in gpt2.hf_files().items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


KINDS = {"gpt2": gpt2_files, "bytes": byte_level, "spaced": spaced, "pieces": sentence_piece}


def write_json_tokenizer(folder: Path, inside: Sequence[str] = ()) -> None:
    """Write a tokenizer of bytes with BOS and EOS and words ``inside`` its vocabulary."""
    names = ["<s>", "</s>", *LETTERS, *inside]
    made = tokenizers.Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<s>", "</s>"])
    made.save(str(folder / "tokenizer.json"))
