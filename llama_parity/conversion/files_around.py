"""Copy or convert the files that stand beside the weights: the tokenizer's and its settings."""

import shutil
from functools import partial
from pathlib import Path

from llama_common.errors import InputError
from llama_common.files import read_json
from llama_torch.checkpoint.file_names import AROUND
from llama_torch.model.config import ModelConfig
from llama_torch.tokenizer.pieces import is_ranks, read_pieces

from .lazy_weights import write_file
from .llama3_tokenizer import hf_tokenizer, meta_tokenizer

ORIGINAL = "original/tokenizer.model"  # where released checkpoints of Llama 3 have Meta's own


def require_whole(path: Path) -> None:
    """Raise InputError for a damaged file: JSON or a SentencePiece model that cannot be read."""
    if path.suffix == ".json":
        read_json(path)
    elif path.name == "tokenizer.model" and not is_ranks(path):
        try:
            read_pieces(path.read_bytes())
        except (ValueError, LookupError):
            raise InputError(f"{path}: not a whole SentencePiece model; copy it again") from None


def copy_around(source: Path, folder: Path, config: ModelConfig, to: str) -> None:
    """Copy the tokenizer and what else stands beside the weights, or convert it.

    Llama 3's list of ranks is Meta's tokenizer.model alone: beside Hugging Face's form it stands
    in ``original``, as released. Where the form to write lacks its file, it is made of the other's.
    """
    for name in AROUND:
        if (source / name).is_file():
            require_whole(source / name)
            shutil.copyfile(source / name, folder / name)
    pieces, fast, original = (folder / n for n in ("tokenizer.model", "tokenizer.json", ORIGINAL))
    if to == "hf" and (source / ORIGINAL).is_file():
        original.parent.mkdir()
        shutil.copyfile(source / ORIGINAL, original)
    if to == "meta" and not pieces.exists():
        if (source / ORIGINAL).is_file():
            shutil.copyfile(source / ORIGINAL, pieces)
        elif fast.exists() and (ranks := meta_tokenizer(source / fast.name, config)):
            write_file(pieces, partial(Path.write_bytes, data=ranks))
    elif to == "hf" and pieces.exists() and is_ranks(source / pieces.name):
        made = {} if fast.exists() else hf_tokenizer(source / pieces.name, config)
        for name, text in made.items():
            if not (folder / name).exists():
                write_file(folder / name, partial(Path.write_text, data=text, encoding="utf-8"))
        original.parent.mkdir(exist_ok=True)
        pieces.rename(original)
