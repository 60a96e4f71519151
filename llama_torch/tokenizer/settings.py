"""The JSON files beside a tokenizer: which tokens they add and name, and how text is encoded.

Every key of them is in one of the lists below: honoured, of a value that changes nothing, or
without any effect on a result. Another key is refused by name.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llama_common.errors import InputError
from llama_common.files import read_json
from llama_common.notes import note

CONFIG, MAP, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"

# Tokens that a file names; templates know them by these names.
ROLES = (
    *("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token"),
)
LISTS = ("additional_special_tokens", "extra_special_tokens")
HONOURED = (
    *(*ROLES, *LISTS, "added_tokens_decoder", "add_bos_token", "legacy", "add_prefix_space"),
    *("add_eos_token", "chat_template", "clean_up_tokenization_spaces", "tokenizer_class"),
)
SWITCHES = (
    *("add_bos_token", "add_eos_token", "legacy", "add_prefix_space"),
    "clean_up_tokenization_spaces",
)
# Keys that would change the result, with the values that do not.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "do_lower_case": (False,),
    "from_slow": (False,),
    "init_inputs": ([],),
    "sp_model_kwargs": ({},),
    "split_special_tokens": (False, True),  # what a user writes is text in any case
    "use_default_system_prompt": (False,),
}
# Keys that say how a tokenizer is stored, batched, truncated or shown.
INERT = (
    "auto_map backend errors fix_mistral_regex is_local keep_accents local_files_only "
    "max_len max_length merges_file model_input_names model_max_length "
    "model_specific_special_tokens name_or_path pad_to_multiple_of pad_token_type_id padding "
    "padding_side processor_class remove_space response_schema return_token_type_ids "
    "sp_model_file spaces_between_special_tokens special_tokens_map_file stride suffix_first "
    "tokenizer_file transformers_version truncation truncation_side truncation_strategy "
    "trust_remote_code unsloth_fixed use_fast verbose vocab_file vocab_size"
)
ID = re.compile("[0-9]{1,18}")
FLAGS = ("lstrip", "normalized", "rstrip", "single_word", "special")


@dataclass(frozen=True)
class AddedToken:
    """A token that stands in a file beside the tokenizer's own."""

    content: str
    id: int | None
    """Its id, where the file tells it."""
    flags: Mapping[str, bool] = field(default_factory=dict)
    source: str = ""
    """The file and key that name it."""

    def to_json(self, id_: int) -> dict[str, Any]:
        """Return the form that ``tokenizer.json`` has for it."""
        flags = dict.fromkeys(FLAGS, False) | {"special": True} | dict(self.flags)
        return {"id": id_, "content": self.content, **flags}


@dataclass
class TokenizerSettings:
    """What the files beside a tokenizer say."""

    folder: Path
    roles: dict[str, str] = field(default_factory=dict)
    """Spellings by role: bos_token and so on."""
    added: dict[str, AddedToken] = field(default_factory=dict)
    """Tokens by their spelling."""
    has_decoder: bool = False
    """Whether tokenizer_config.json lists the added tokens with their ids."""
    tokenizer_class: str | None = None
    add_bos_token: bool | None = None
    add_eos_token: bool | None = None
    """Whether transformers puts EOS after a text; a prompt, which is continued, has none here."""
    clean_up_tokenization_spaces: bool | None = None
    """Whether transformers 4 takes the space before punctuation out of decoded text."""
    legacy: bool | None = None
    """Whether SentencePiece puts a space before text that follows a special token."""
    add_prefix_space: bool | None = None
    """Whether a space is put before text at all."""


def read_settings(folder: Path) -> TokenizerSettings:
    """Return what the files of a folder say.

    With an added_tokens_decoder tokenizer_config.json says all, as in transformers; else
    special_tokens_map.json replaces its tokens, and added_tokens.json has others.
    Raises InputError for a key that is not known, or has a value that would change the result and
    is not supported.
    """
    found = TokenizerSettings(folder)
    for name in (CONFIG, MAP):
        path = folder / name
        given = read_json(path) if path.is_file() else None
        if given is not None and name == MAP:
            _note_conflicts(found, given, path)
        if given is not None and not found.has_decoder:
            _require_supported(given, path)
            _read_roles(found, given, path)
            _read_added(found, given, path)
    path = folder / ADDED
    if path.is_file() and not found.has_decoder:
        for name, id_ in read_json(path).items():
            if type(id_) is not int or id_ < 0:
                raise InputError(f"{path}: {name!r} has id {id_!r}; give a whole number")
            is_special = name in found.added or name in found.roles.values()
            flags = {"special": is_special, "normalized": not is_special}
            _add(found, AddedToken(name, id_, flags, str(path)))
    return found


def _note_conflicts(found: TokenizerSettings, given: Mapping[str, Any], path: Path) -> None:
    """Note the roles for which special_tokens_map.json has other tokens."""
    for role, name in found.roles.items():
        other = _content(given.get(role))
        if isinstance(other, str) and other and other != name:
            note(
                f"{path}: {role} is {other!r}, and {name!r} in {CONFIG}; "
                f"{(name if found.has_decoder else other)!r} is taken, as in transformers"
            )


def _require_supported(given: Mapping[str, Any], path: Path) -> None:
    known = {*HONOURED, *INERT.split()}
    problems = [
        f"{key}={value!r} (supported: {' or '.join(map(repr, NEUTRAL[key]))})"
        for key, value in given.items()
        if key in NEUTRAL and value is not None and value not in NEUTRAL[key]
    ]
    problems += [
        f"{key}={value!r} (unknown: remove it if it changes nothing)"[:200]
        for key, value in given.items()
        if key not in known and key not in NEUTRAL and not _names_a_token(key, value)
    ]
    if problems:
        raise InputError(f"{path}: {'; '.join(problems)}")
    if given.get("split_special_tokens"):
        note(f"{path}: a template's special tokens are tokens, whatever split_special_tokens says")


def _names_a_token(key: str, value: Any) -> bool:
    """Return whether an unlisted key is a token's name or id, and its value one."""
    if key.endswith("_token_id"):
        return value is None or type(value) is int
    return key.endswith("_token") and (value is None or isinstance(_content(value), str))


def _content(token: Any) -> Any:
    """Return the text of a token, which stands alone or with its flags."""
    return token.get("content") if isinstance(token, dict) else token


def _read_roles(found: TokenizerSettings, given: Mapping[str, Any], path: Path) -> None:
    switches = {*SWITCHES, *INERT.split()}  # add_bos_token names none
    for role, token in given.items():
        if not role.endswith("_token") or role in switches or token is None:
            continue
        name = _content(token)
        if not isinstance(name, str):
            raise InputError(f"{path}: {role} is {token!r} and no text; correct it")
        if name:
            found.roles[role] = name
    kind = given.get("tokenizer_class")
    if kind is not None and not isinstance(kind, str):
        raise InputError(f"{path}: tokenizer_class is {kind!r} and no text; correct it")
    found.tokenizer_class = kind or found.tokenizer_class
    for key in SWITCHES:
        value = given.get(key)
        if value is not None and type(value) is not bool:
            raise InputError(f"{path}: {key} is {value!r}; give true or false")
        if value is not None:
            setattr(found, key, value)


def _read_added(found: TokenizerSettings, given: Mapping[str, Any], path: Path) -> None:
    decoder = given.get("added_tokens_decoder")
    decoder = {} if decoder is None else decoder
    if not isinstance(decoder, dict):
        raise InputError(f"{path}: added_tokens_decoder is {type(decoder).__name__}; give ids")
    found.has_decoder |= "added_tokens_decoder" in given
    for id_, token in sorted(decoder.items(), key=lambda item: (len(item[0]), item[0])):
        content = _content(token)
        if not ID.fullmatch(id_) or not isinstance(content, str):
            raise InputError(f"{path}: added_tokens_decoder has {id_!r}: {token!r}; correct it")
        source = f"{path}: added_tokens_decoder"
        _add(found, AddedToken(content, int(id_), _flags(token, source), source))
    for key in LISTS:
        tokens = given.get(key)
        for token in _named(tokens, f"{path}: {key}"):
            if token.content not in found.added:
                _add(found, token)
        if isinstance(tokens, dict):  # templates know them by these names
            found.roles |= {role: _content(token) for role, token in tokens.items()}


def _named(given: Any, source: str) -> Iterable[AddedToken]:
    if given is not None and not isinstance(given, list | dict):
        raise InputError(f"{source} is {given!r}; give a list of tokens")
    for token in given.values() if isinstance(given, dict) else given or ():
        name = _content(token)
        if not isinstance(name, str) or not name:
            raise InputError(f"{source}: {token!r} is no text; correct it")
        yield AddedToken(name, None, _flags(token, source), source)


def _flags(token: Any, source: str) -> dict[str, bool]:
    """Return the flags that stand beside a token's text."""
    if not isinstance(token, dict):
        return {}
    flags = {key: token[key] for key in FLAGS if key in token}
    for flag, value in flags.items():
        if type(value) is not bool:
            raise InputError(
                f"{source}: {token['content']!r} has {flag}={value!r}; give true or false"
            )
    return flags


def _add(found: TokenizerSettings, token: AddedToken) -> None:
    """Keep a token; a second file may say its id again, and no other."""
    before = found.added.get(token.content)
    if before is None or before.id is None:
        found.added[token.content] = token
    elif token.id not in (None, before.id):
        raise InputError(
            f"{token.source}: {token.content!r} has id {token.id}, and in {before.source} "
            f"{before.id}; correct one of them"
        )
