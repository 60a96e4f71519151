"""Write the files of a model directory that stand beside its weights."""

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

from llama_common.files import atomic_write, read_json, write_text

from ..model.config import REWARD_KEYS, ModelConfig, is_reward_model
from ..tokenizer.gpt2 import END_OF_TEXT_ID, VOCAB_SIZE, hf_files
from .file_names import AROUND, TOKENIZERS

CONFIG_FILE = "config.json"
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")  # keys of config.json


def write_directory_files(directory: Path, config: ModelConfig, source: Path | None = None) -> None:
    """Write config.json and the tokenizer's files.

    These are copies of those in ``source``, a model directory, with its generation_config.json, the
    token ids of its config.json and whether it is of a reward model. Where it has no tokenizer
    they are GPT-2's, for a vocabulary that holds its ids.
    """
    content = json.dumps(config_content(config, source), indent=2) + "\n"
    texts = hf_files() if _has_gpt2(config, source) else {}
    for path in _around(source):
        if not path.parent.samefile(directory):
            atomic_write(directory / path.name, partial(shutil.copyfile, path))
    for name, text in {CONFIG_FILE: content, **texts}.items():
        write_text(directory / name, text)


def config_content(config: ModelConfig, source: Path | None = None) -> dict[str, Any]:
    """Return the keys of config.json, as ``write_directory_files`` writes them."""
    hf = config.to_hf()
    if _has_gpt2(config, source):
        hf |= {"bos_token_id": END_OF_TEXT_ID, "eos_token_id": END_OF_TEXT_ID}
    if source and (source / CONFIG_FILE).is_file():
        given = read_json(source / CONFIG_FILE)
        hf |= {key: given[key] for key in TOKEN_IDS if key in given}
        hf |= REWARD_KEYS if is_reward_model(given) else {}
    return hf


def _around(source: Path | None) -> list[Path]:
    return [source / name for name in AROUND if (source / name).is_file()] if source else []


def _has_gpt2(config: ModelConfig, source: Path | None) -> bool:
    """Return whether the tokenizer is GPT-2's: there is no other, and the vocabulary holds it."""
    names = {path.name for path in _around(source)}
    return config.vocab_size >= VOCAB_SIZE and not {*TOKENIZERS} & names
