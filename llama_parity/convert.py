"""Convert a Llama between Hugging Face's form and Meta's or GGUF: ``tools/convert.py SRC DST``.

Meta's form is described in conversion/meta_checkpoint.py, GGUF in conversion/gguf_*.py.
"""

import importlib.util
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import tyro

from llama_common import cli
from llama_common.errors import InputError, check
from llama_common.files import finish, publish_folder, temporary_folder
from reference_np.foreign import INDEX_FILE, META_FILES, MODEL_FILE

from .conversion.file_kinds import is_gguf, names_file

if TYPE_CHECKING:
    from llama_torch.model.config import ModelConfig


@dataclass(frozen=True)
class ConvertConfig:
    """Convert a Llama between Hugging Face's form and Meta's or GGUF, or to another dtype."""

    command: ClassVar[str] = "python tools/convert.py"

    src: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")]
    """A directory in either form, or one .safetensors or .gguf file."""
    dst: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DST")]
    """Directory to write, new or empty; or a new file, of a name that ends in .gguf."""
    to: Literal["", "hf", "meta", "gguf"] = ""
    """Form to write; empty = GGUF if DST ends so, else the one that SRC is not."""
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
        if not self.src:
            raise InputError("SRC '' names nothing; give a model directory or a .safetensors file")
        for name, valid, requirement in (
            ("shards", 1 <= self.shards <= 99, "must lie between 1 and 99"),
            ("max_shard_gb", 0 < self.max_shard_gb < math.inf, "must be positive"),
            ("max_seq_len", 0 <= self.max_seq_len < 2**31, "must lie between 0 and 2^31"),
            ("rope_scaling_factor", 0 <= self.rope_scaling_factor < math.inf, "must be positive"),
            ("bos_token_id", self.bos_token_id >= -1, "must be a token's id"),
            ("eos_token_id", all(i >= 0 for i in self.eos_token_id), "must be tokens' ids"),
        ):
            check(valid, name, getattr(self, name), requirement)


def require_new(path: Path) -> None:
    """Raise InputError unless ``path`` can be made, or is an empty directory."""
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise InputError(f"{path}: exists already; give a new or an empty directory")
    if not path.parent.is_dir():
        raise InputError(f"{path}: there is no directory {path.parent}; make it first")


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """Yield a temporary directory beside ``path`` that becomes it, or vanishes on any failure."""
    with temporary_folder(path.with_name(f".{path.name}")) as temporary:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                finish(file)
        publish_folder(temporary, path)


def find_form(path: Path) -> str:
    """Return "hf", "meta" or "gguf", the form that ``path`` holds; InputError for none and two."""
    if is_gguf(path):
        return "gguf"
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
        ("shards", to == "gguf" and settings.shards != 1, "a GGUF file is one"),
        ("max-shard-gb", to == "meta" and settings.max_shard_gb != 5, "not Meta's; use --shards"),
        ("max-shard-gb", to == "gguf" and settings.max_shard_gb != 5, "a GGUF file is one"),
        ("bos-token-id", to == "meta" and settings.bos_token_id >= 0, "not Meta's"),
        ("eos-token-id", to == "meta" and settings.eos_token_id, "not Meta's"),
        ("max-seq-len", form == "hf" and settings.max_seq_len, "config.json says it"),
        ("max-seq-len", form == "gguf" and settings.max_seq_len, "the file says it"),
        ("rope-scaling-factor", form == "hf" and settings.rope_scaling_factor, "in config.json"),
        ("rope-scaling-factor", form == "gguf" and settings.rope_scaling_factor, "in the file"),
    ):
        if unused:
            raise InputError(f"--{name}: {why}; leave it out")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    return cli.run(lambda: _main(sys.argv[1:] if argv is None else argv))


def _main(argv: Sequence[str]) -> int:
    settings = cli.parse(ConvertConfig, argv)
    source, target = Path(settings.src), Path(settings.dst).resolve()
    form = find_form(source)
    written_as = "gguf" if target.suffix.lower() == ".gguf" else ""
    to = settings.to or written_as or {"hf": "meta", "meta": "hf", "gguf": "hf"}[form]
    _check_pair(settings, form, to, written_as)
    if to != "gguf" and not settings.to and (why := names_file(target)):
        raise InputError(f"{settings.dst}: would be a directory{why} --to {to} writes one so named")
    check_flags(settings, form, to)
    if source.resolve() in (target, *target.parents):
        raise InputError(f"{settings.dst}: lies in {source}, the source; give another directory")
    require_new(target)
    # What follows imports torch, which takes seconds: a wrong flag or directory is told before.
    if importlib.util.find_spec("torch") is None:
        raise InputError("convert needs PyTorch: pip install 'llama-parity[torch]'")
    if "gguf" in (form, to):
        return _convert_gguf(settings, source, target, form)
    return _convert(settings, source, target, form, to)


def _check_pair(settings: ConvertConfig, form: str, to: str, written_as: str) -> None:
    """Raise InputError for a pair of forms without a way between them, and a name of another."""
    if (to == "gguf") != (written_as == "gguf"):
        raise InputError(f"--to {to}: a name that ends in .gguf is a GGUF file's, and no other's")
    if to == "gguf" and Path(settings.dst).is_dir():
        raise InputError(f"{settings.dst}: exists already; give a new file's name")
    if "gguf" in (form, to) and "hf" not in (form, to):
        raise InputError(f"from {form} to {to}: convert to Hugging Face's form first (--to hf)")


def _convert_gguf(settings: ConvertConfig, source: Path, target: Path, form: str) -> int:
    """Convert from GGUF, or to it."""
    import torch

    from .conversion.gguf_conversion import from_gguf, to_gguf

    dtype = None if settings.dtype == "keep" else getattr(torch, settings.dtype)
    ends = settings.bos_token_id, settings.eos_token_id
    if form != "gguf":
        config = to_gguf(source, target, dtype, *ends)
        _print_summary(settings, config, form, "gguf")
        return 0
    with new_directory(target) as folder:
        config = from_gguf(source, folder, dtype, settings.max_shard_gb, *ends)
    _print_summary(settings, config, form, "hf")
    return 0


def _convert(settings: ConvertConfig, source: Path, target: Path, form: str, to: str) -> int:
    import torch

    from llama_torch.checkpoint.file_names import GENERATION_FILE

    from .conversion import token_ids
    from .conversion.files_around import copy_around
    from .conversion.hf_checkpoint import read_hf, write_hf
    from .conversion.meta_checkpoint import read_meta, write_meta
    from .conversion.meta_params import check_expressible

    if form == "hf":
        model = read_hf(source)
    else:
        model = read_meta(source, settings.max_seq_len, settings.rope_scaling_factor)
    if to == "meta":
        check_expressible(model.config, settings.shards, source)
    dtype = None if settings.dtype == "keep" else getattr(torch, settings.dtype)
    beside = source if source.is_dir() else source.parent
    filed = token_ids.ids_of_files(beside, model.config.vocab_size)
    flagged = token_ids.ids_of_flags(
        settings.bos_token_id, settings.eos_token_id, model.config.vocab_size
    )
    ids = filed | flagged
    if to == "hf":
        ids = token_ids.complete_ids(ids, beside, model.config, by_size=form == "meta")
    if (form, to) == ("meta", "hf"):  # whose params.json has no place for them
        token_ids.require_ids(ids, filed, beside)
    with new_directory(target) as folder:
        copy_around(beside, folder, model.config, to)
        if to == "hf":
            write_hf(folder, model, dtype, settings.max_shard_gb, ids)
        else:
            write_meta(folder, model, dtype, settings.shards)
        if ids and ((form, to) != ("hf", "hf") or (folder / GENERATION_FILE).exists()):
            token_ids.write_generation_config(folder, ids, flagged)
    _print_summary(settings, model.config, form, to)
    return 0


def _print_summary(settings: ConvertConfig, config: "ModelConfig", form: str, to: str) -> None:
    target = Path(settings.dst)
    tied = ", tied embeddings" if config.tie_embeddings else ""
    print(f"{target}: {config.n_layers} layers of width {config.dim}{tied}, written as {to}")
    if to == "meta":
        print(f"params.json has no context length: back with --max-seq-len {config.max_seq_len}")
    elif form == "meta" and not settings.max_seq_len:
        print(f"context length {config.max_seq_len}, assumed; --max-seq-len sets another")
    if to == "gguf":
        return
    wanted = ("tokenizer.model",) if to == "meta" else ("tokenizer.json", "tokenizer.model")
    if not any((target / name).exists() for name in wanted):
        print(f"no {' and no '.join(wanted)} to read text with: copy the checkpoint's there")
