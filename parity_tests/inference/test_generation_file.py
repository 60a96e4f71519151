"""What generation_config.json may ask for: followed, said to be left to flags, or refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from llama_common.errors import InputError
from llama_torch.inference.generation_file import INERT, NEUTRAL, SAMPLING, read_generation_file


def check(folder: Path, **content: Any) -> None:
    (folder / "generation_config.json").write_text(json.dumps(content))
    read_generation_file(folder)


@pytest.mark.parametrize(
    "asked",
    [
        {"suppress_tokens": [3]},
        {"begin_suppress_tokens": [3]},
        {"bad_words_ids": [[3]]},
        {"no_repeat_ngram_size": 2},
        {"forced_eos_token_id": 2},
        {"num_beams": 4},
        {"min_new_tokens": 5},
        {"guidance_scale": 1.5},
        {"sequence_bias": [[[3], 1.0]]},
        {"token_healing": True},
    ],
    ids=lambda asked: next(iter(asked)),
)
def test_what_would_change_the_tokens_is_refused_by_name(
    tmp_path: Path, asked: dict[str, Any]
) -> None:
    ((key, value),) = asked.items()
    with pytest.raises(InputError) as caught:
        check(tmp_path, **asked, eos_token_id=2)
    assert f"generation_config.json: {key}={value!r} is not supported; remove" in str(caught.value)
    check(tmp_path, **{key: None})


def test_neutral_values_and_other_keys_are_silent(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    neutral = {key: values[0] for key, values in NEUTRAL.items() if values}
    check(tmp_path, **neutral, **dict.fromkeys(INERT.split(), 1))
    assert capsys.readouterr().err == ""


def test_sampling_settings_are_left_to_flags_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in Llama 3's file; so are keys that nobody knows."""
    check(tmp_path, do_sample=True, temperature=0.6, top_p=0.9, max_length=4096, shout=1)
    said = capsys.readouterr().err
    assert "do_sample=True, temperature=0.6, top_p=0.9 is not taken from there" in said
    assert "shout is not known and not followed" in said
    assert "max_length" not in said


def test_the_keys_are_those_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    known = {*SAMPLING, *NEUTRAL, *INERT.split()}
    assert vars(transformers.GenerationConfig()).keys() <= known
