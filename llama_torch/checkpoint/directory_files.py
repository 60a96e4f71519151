"""Write the files of a model directory that stand beside its weights."""

import json
import shutil
from functools import partial
from pathlib import Path

from llama_common.files import atomic_write, read_json, write_text

from ..model.config import REWARD_KEYS, ModelConfig, is_reward_model
from ..tokenizer.gpt2 import END_OF_TEXT_ID, VOCAB_SIZE, hf_files
from .file_names import AROUND, TOKENIZERS

TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")  # keys of config.json


def write_directory_files(directory: Path, config: ModelConfig, source: Path | None = None) -> None:
    """Write config.json and the tokenizer's files.

    These are copies of those in ``source``, a model directory, with its generation_config.json, the
    token ids of its config.json and whether it is of a reward model. Where it has no tokenizer
    they are GPT-2's, for a vocabulary that holds its ids.
    """
    hf, texts = config.to_hf(), dict[str, str]()
    around = [source / name for name in AROUND if (source / name).is_file()] if source else []
    if config.vocab_size >= VOCAB_SIZE and not {*TOKENIZERS} & {path.name for path in around}:
        hf |= {"bos_token_id": END_OF_TEXT_ID, "eos_token_id": END_OF_TEXT_ID}
        texts = hf_files()
    if source and (source / "config.json").is_file():
        given = read_json(source / "config.json")
        hf |= {key: given[key] for key in TOKEN_IDS if key in given}
        hf |= REWARD_KEYS if is_reward_model(given) else {}
    for path in around:
        if not path.parent.samefile(directory):
            atomic_write(directory / path.name, partial(shutil.copyfile, path))
    for name, text in {"config.json": json.dumps(hf, indent=2) + "\n", **texts}.items():
        write_text(directory / name, text)
