"""The files beside a tokenizer: values that are refused by name, and those that change nothing."""

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest

from llama_common.errors import InputError
from llama_common.files import write_json
from llama_torch.tokenizer.loading import load_tokenizer

from ..support.tokenizers import write_json_tokenizer

VOCAB = 999


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer_config.json", {"do_lower_case": True}, "do_lower_case=True (supported: False)"),
        ("tokenizer_config.json", {"shout": 1}, "shout=1 (unknown: remove it"),
        ("special_tokens_map.json", {"normalise": "x"}, "normalise='x' (unknown"),
        ("tokenizer_config.json", {"legacy": "no"}, "legacy is 'no'; give true or false"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": {}}}, "has 'x': {}"),
        ("tokenizer_config.json", {"added_tokens_decoder": [1]}, "added_tokens_decoder is list"),
        ("tokenizer_config.json", {"extra_special_tokens": [1]}, "1 is no text"),
        ("tokenizer_config.json", {"pad_token": 3}, "pad_token is 3 and no text"),
        ("tokenizer_config.json", {"pad_token": True}, "pad_token is True and no text"),
        ("tokenizer_config.json", {"eos_token": False}, "eos_token is False and no text"),
        ("tokenizer_config.json", {"eos_token": {}}, "eos_token is {} and no text"),
        ("tokenizer_config.json", {"prepend_token": True}, "prepend_token=True (unknown"),
        ("tokenizer_config.json", {"add_space_after_token": 0}, "after_token=0 (unknown"),
        ("tokenizer_config.json", {"x_token": {"content": 1}}, "x_token={'content': 1} (unknown"),
        ("tokenizer_config.json", {"x_token": ["a"]}, "x_token=['a'] (unknown"),
        ("tokenizer_config.json", {"strip_token_id": "a"}, "strip_token_id='a' (unknown"),
        ("tokenizer_config.json", {"strip_token_id": True}, "strip_token_id=True (unknown"),
        ("special_tokens_map.json", {"strip_token_id": 1.5}, "strip_token_id=1.5 (unknown"),
        *(
            (file, {key: value}, f"{key} is {value!r}; give a list of tokens")
            for file in ("tokenizer_config.json", "special_tokens_map.json")
            for key in ("additional_special_tokens", "extra_special_tokens")
            for value in ("<x>", "", 5, 0, True, False, 1.5)
        ),
        ("tokenizer_config.json", {"added_tokens_decoder": "ab"}, "added_tokens_decoder is str"),
        ("tokenizer_config.json", {"added_tokens_decoder": False}, "added_tokens_decoder is bool"),
        *(
            ("tokenizer_config.json", {"added_tokens_decoder": {id_: "<x>"}}, f"has {id_!r}: '<x>'")
            for id_ in ("²", "٣", "-1", "1_0", " 1", "", "9" * 3000)
        ),
        # Of a longer one the message shows the beginning and the end.
        *(
            ("tokenizer_config.json", {"added_tokens_decoder": {"9" * 5000: "<x>"}}, message)
            for message in ("added_tokens_decoder has '999", "999': '<x>'; correct it")
        ),
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": {"258": {"content": "<x>", "lstrip": "no"}}},
            "'<x>' has lstrip='no'; give true or false",
        ),
        ("added_tokens.json", {"<x>": "1"}, "'<x>' has id '1'"),
        ("added_tokens.json", {"<x>": 600}, "'<x>' has id 600, and tokenizer.json gives it 258"),
        ("added_tokens.json", {"<s>": 5}, "'<s>' has id 5, and tokenizer.json gives it 0"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(
    tmp_path: Path, file: str, content: Any, message: str
) -> None:
    write_json_tokenizer(tmp_path)
    write_json(tmp_path / file, content)
    with pytest.raises(InputError) as caught:
        load_tokenizer(tmp_path, VOCAB)
    assert message in str(caught.value)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("content", "roles"),
    [
        ({"image_token": "<i>", "image_token_id": 7}, {"image_token": "<i>"}),
        ({"image_token": {"content": "<i>", "lstrip": False}}, {"image_token": "<i>"}),
        ({"image_token": None, "image_token_id": None, "pad_token": ""}, {}),
        ({"add_eos_token": True, "add_bos_token": False}, {}),
        ({"extra_special_tokens": {"image_token": "<i>"}}, {"image_token": "<i>"}),
        ({"extra_special_tokens": ["<i>"], "additional_special_tokens": None}, {}),
        ({"added_tokens_decoder": None}, {}),
    ],
)
def test_roles_of_any_name_are_text_and_their_ids_numbers(
    tmp_path: Path, content: dict[str, Any], roles: dict[str, str]
) -> None:
    write_json_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(content))
    tokenizer = load_tokenizer(tmp_path, VOCAB)
    assert tokenizer.others == roles
    assert ("<i>" in tokenizer.special) == ("extra_special_tokens" in content)


@pytest.mark.parametrize("value", [{}, [], [1], "yes", 1, None])
@pytest.mark.parametrize("place", ["pre_tokenizer", "normalizer", "decoder"])
@pytest.mark.parametrize("key", ["add_prefix_space", "pretokenizers", "normalizers", "decoders"])
def test_steps_of_other_types_end_in_no_other_error(
    tmp_path: Path, place: str, key: str, value: Any
) -> None:
    write_json_tokenizer(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    types = {"normalizer": "Prepend", "pre_tokenizer": "ByteLevel", "decoder": "Sequence"}
    content |= {place: {"type": types[place], key: value}}
    settings = {"tokenizer_class": "LlamaTokenizer", "add_prefix_space": False}
    for pre_tokenizer in (content["pre_tokenizer"], None):
        write_json(tmp_path / "tokenizer.json", content | {"pre_tokenizer": pre_tokenizer})
        for beside in ({}, settings, settings | {"tokenizer_class": "GPT2Tokenizer"}):
            write_json(tmp_path / "tokenizer_config.json", beside)
            with contextlib.suppress(InputError):
                load_tokenizer(tmp_path, VOCAB)
