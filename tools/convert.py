"""Convert a Llama between Hugging Face's form and Meta's: ``python tools/convert.py SRC DST``.

Meta's form is described in meta_checkpoint.py.
"""

import math
import shutil
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

if __name__ == "__main__":
    # The tools are not installed. Run as a script, their folder is on the path, where its parent
    # should be.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from llama_torch.checkpoint.hf import INDEX_FILE, MODEL_FILE
from llama_torch.common import cli
from llama_torch.common.errors import InputError, check
from llama_torch.common.files import finish, publish_folder, read_json, temporary_folder
from llama_torch.inference.generation_file import GENERATION_FILE
from llama_torch.model.config import ModelConfig
from llama_torch.tokenizer.pieces import is_ranks, read_pieces
from tools.conversion.hf_checkpoint import read_hf, write_hf
from tools.conversion.lazy_weights import write_file
from tools.conversion.llama3_tokenizer import hf_tokenizer, meta_tokenizer
from tools.conversion.meta_checkpoint import META_FILES, read_meta, write_meta
from tools.conversion.meta_params import check_expressible
from tools.conversion.token_ids import (
    complete_ids,
    ids_of_files,
    ids_of_flags,
    require_ids,
    write_generation_config,
)

AROUND = (
    "tokenizer.model tokenizer.json tokenizer_config.json special_tokens_map.json "
    f"added_tokens.json chat_template.jinja {GENERATION_FILE}"
)
ORIGINAL = "original/tokenizer.model"  # where released checkpoints of Llama 3 have Meta's own


@dataclass(frozen=True)
class ConvertConfig:
    """Convert a Llama between Hugging Face's form and Meta's, cut anew or in another dtype."""

    src: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")]
    """A directory in either form, or one .safetensors file."""
    dst: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DST")]
    """Directory to write; it must not exist, or be empty."""
    to: Literal["", "hf", "meta"] = ""
    """Form to write; empty = the one that SRC is not."""
    dtype: Literal["keep", "float32", "bfloat16", "float16"] = "keep"
    """Precision to store; keep = the source's."""
    shards: int = 1
    """Meta: number of consolidated files; each is in memory, whole, while it is written."""
    max_shard_gb: float = 5.0
    """Hugging Face: largest file, in units of 10^9 bytes."""
    max_seq_len: int = 0
    """From Meta: context length, which params.json lacks; 0 = 4096, or Llama 3's for its models."""
    rope_scaling_factor: float = 0.0
    """From Meta: factor of the scaled rotary frequencies, where params.json lacks it."""
    bos_token_id: int = -1
    """Hugging Face: the token that begins a text; -1 = what the files tell."""
    eos_token_id: tuple[int, ...] = ()
    """Hugging Face: the token or tokens that end a text; none = what the files tell."""

    def __post_init__(self) -> None:
        for name, valid, requirement in (
            ("shards", 1 <= self.shards <= 99, "must lie between 1 and 99"),
            ("max_shard_gb", 0 < self.max_shard_gb < math.inf, "must be positive"),
            ("max_seq_len", 0 <= self.max_seq_len < 2**31, "must lie between 0 and 2^31"),
            ("rope_scaling_factor", 0 <= self.rope_scaling_factor < math.inf, "must be positive"),
            ("bos_token_id", self.bos_token_id >= -1, "must be a token's id"),
            ("eos_token_id", all(i >= 0 for i in self.eos_token_id), "must be tokens' ids"),
        ):
            check(valid, name, getattr(self, name), requirement)


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """Yield a temporary directory beside ``path`` that becomes it, or vanishes on any failure."""
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise InputError(f"{path}: exists already; give a new or an empty directory")
    if not path.parent.is_dir():
        raise InputError(f"{path}: there is no directory {path.parent}; make it first")
    with temporary_folder(path.with_name(f".{path.name}")) as temporary:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                finish(file)
        publish_folder(temporary, path)


def find_form(path: Path) -> str:
    """Return "hf" or "meta", whichever form ``path`` holds; InputError for neither and for both."""
    if not path.exists():
        raise InputError(f"{path}: no such file; give a model directory or a .safetensors file")
    if not path.is_dir():
        if path.suffix == ".pth":
            raise InputError(f"{path}: one file of several; give the directory that holds it")
        return "hf"
    forms = ["hf"] if any((path / name).exists() for name in (MODEL_FILE, INDEX_FILE)) else []
    forms += ["meta"] if any(path.glob(META_FILES)) else []
    if len(forms) == 1:
        return forms[0]
    raise InputError(
        f"{path}: holds {'both' if forms else 'neither'} {MODEL_FILE} "
        f"{'and' if forms else 'nor'} consolidated.00.pth; give a directory with one of them"
    )


def check_flags(settings: ConvertConfig, form: str, to: str) -> None:
    """Raise InputError for flags that would change nothing between these two forms."""
    for name, unused, why in (
        ("shards", to == "hf" and settings.shards != 1, "counts Meta's files; use --max-shard-gb"),
        ("max-shard-gb", to == "meta" and settings.max_shard_gb != 5, "not Meta's; use --shards"),
        ("bos-token-id", to == "meta" and settings.bos_token_id >= 0, "not Meta's"),
        ("eos-token-id", to == "meta" and settings.eos_token_id, "not Meta's"),
        ("max-seq-len", form == "hf" and settings.max_seq_len, "config.json says it"),
        ("rope-scaling-factor", form == "hf" and settings.rope_scaling_factor, "in config.json"),
    ):
        if unused:
            raise InputError(f"--{name}: {why}; leave it out")


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
    for name in AROUND.split():
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


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    return cli.run(lambda: _main(sys.argv[1:] if argv is None else argv))


def _main(argv: Sequence[str]) -> int:
    settings = cli.parse(ConvertConfig, argv)
    source, target = Path(settings.src), Path(settings.dst).resolve()
    form = find_form(source)
    to = settings.to or {"hf": "meta", "meta": "hf"}[form]
    check_flags(settings, form, to)
    if source.resolve() in (target, *target.parents):
        raise InputError(f"{settings.dst}: lies in {source}, the source; give another directory")
    if form == "hf":
        model = read_hf(source)
    else:
        model = read_meta(source, settings.max_seq_len, settings.rope_scaling_factor)
    if to == "meta":
        check_expressible(model.config, settings.shards, source)
    dtype = None if settings.dtype == "keep" else getattr(torch, settings.dtype)
    beside = source if source.is_dir() else source.parent
    filed = ids_of_files(beside, model.config.vocab_size)
    flagged = ids_of_flags(settings.bos_token_id, settings.eos_token_id, model.config.vocab_size)
    ids = filed | flagged
    if to == "hf":
        ids = complete_ids(ids, beside, model.config, by_size=form == "meta")
    if (form, to) == ("meta", "hf"):  # whose params.json has no place for them
        require_ids(ids, filed, beside)
    with new_directory(target) as folder:
        copy_around(beside, folder, model.config, to)
        if to == "hf":
            write_hf(folder, model, dtype, settings.max_shard_gb, ids)
        else:
            write_meta(folder, model, dtype, settings.shards)
        if ids and ((form, to) != ("hf", "hf") or (folder / GENERATION_FILE).exists()):
            write_generation_config(folder, ids, flagged)
    _print_summary(settings, model.config, form, to)
    return 0


def _print_summary(settings: ConvertConfig, config: ModelConfig, form: str, to: str) -> None:
    target = Path(settings.dst)
    tied = ", tied embeddings" if config.tie_embeddings else ""
    print(f"{target}: {config.n_layers} layers of width {config.dim}{tied}, written as {to}")
    if to == "meta":
        print(f"params.json has no context length: back with --max-seq-len {config.max_seq_len}")
    elif form == "meta" and not settings.max_seq_len:
        print(f"context length {config.max_seq_len}, assumed; --max-seq-len sets another")
    wanted = ("tokenizer.model",) if to == "meta" else ("tokenizer.json", "tokenizer.model")
    if not any((target / name).exists() for name in wanted):
        print(f"no {' and no '.join(wanted)} to read text with: copy the checkpoint's there")


if __name__ == "__main__":
    # A kill that can be caught still removes what is half-written.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main())
