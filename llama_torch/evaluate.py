"""Perplexity of a checkpoint: ``python -m llama_torch.evaluate --ckpt DIR --data FILE [FILE ...]``.

Without --data the text is what a run held out for validation, where --ckpt is of a run directory.

Every document is scored on its own, and every token of it once (the first only if the tokenizer
has a BOS or EOS to put before it), in windows of at most ``context`` tokens. The first window
scores all tokens that it predicts, each later one the next ``stride`` tokens; the last ends with
the document, and reads as many tokens as the others.

With the stride as long as the window, windows and result are those of EleutherAI's
lm-evaluation-harness (model ``hf``, tasks of the type ``loglikelihood_rolling``). Where the
tokenizer puts a BOS before the text, the harness scores that too, unless it is given
``--model_args add_bos_token=False``.
"""

import dataclasses
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from llama_common import cli
from llama_common.errors import InputError, check, check_positive, printable

from .checkpoint.file_names import RUN_FILE
from .checkpoint.weight_files import require_weights
from .data.text_files import find_files
from .inference.config import LoadConfig

if TYPE_CHECKING:
    from .inference.perplexity import Measurement
    from .tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True)
class EvaluateConfig:
    """Measure a checkpoint on text: perplexity, bits per byte, tokens per second."""

    command: ClassVar[str] = "python -m llama_torch.evaluate"

    load: LoadConfig
    data: tuple[str, ...] = ()
    """Files, folders or globs (.txt .md .jsonl, also .gz or .zst; .parquet); none = the part of its
    text that a run directory's run held out."""
    text_field: str = "text"
    """Name of the text field in .jsonl and .parquet records."""
    context: int = 0
    """Tokens in a window; 0 = the model's context."""
    stride: int = 0
    """Tokens scored in each window after the first; 0 = half the window."""
    batch_size: int = 8
    """Windows in one forward pass."""
    json: bool = False
    """Print the result as JSON."""

    def __post_init__(self) -> None:
        check_positive(self, "batch_size")
        check(self.batch_size < 2**31, "batch_size", self.batch_size, "must be below 2^31")
        for name in ("context", "stride"):
            check(getattr(self, name) >= 0, name, getattr(self, name), "must not be negative")


class Text(NamedTuple):
    """The text to measure: its name, its documents, and a document's place by its number."""

    name: str
    documents: "Callable[[Tokenizer], Iterable[str]]"
    place: Callable[[int], str]


def find_text(config: EvaluateConfig) -> Text:
    """Return the text of --data, or the held-out part of the run that --ckpt belongs to.

    Raises InputError where there is neither.
    """
    if config.data:
        files, name = find_files(config.data), ", ".join(config.data)
        from .data.documents import document_place, documents

        source = files, config.text_field
        return Text(name, lambda _: documents(*source), partial(document_place, *source))
    from .training.held_out import describe_held_out, find_run, held_out_documents, load_held_out

    ckpt = Path(config.load.ckpt)
    run = find_run(ckpt)
    if run is None:
        raise InputError(
            f"--data is missing, and {ckpt} belongs to no run whose held-out text could stand in "
            "for it; name the text to measure with --data"
        )
    corpus = load_held_out(run)
    return Text(
        describe_held_out(corpus),
        partial(held_out_documents, corpus),
        lambda number: f"{run / RUN_FILE}: held-out document {number}",
    )


def describe(found: "Measurement", tokenizer: "Tokenizer") -> str:
    """Return a measurement as lines of text: figures, counts, window and stride."""
    before = " ".join(ascii(tokenizer.names.get(id_, id_)) for id_ in found.before)
    unscored = f"after {before}" if before else "without its first token, whose bytes count"
    return (
        f"perplexity     {found.perplexity:,.3f} per token\n"
        f"bits per byte  {found.bits_per_byte:.6f}\n"
        f"speed          {found.tokens_per_second:,.0f} tokens/s\n"
        f"tokens {found.tokens:,}, bytes {found.bytes:,}, documents {found.documents:,}\n"
        f"window {found.context:,}, stride {found.stride:,}; each document scored {unscored}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    return cli.run(lambda: _main(sys.argv[1:] if argv is None else argv))


def _main(argv: Sequence[str]) -> int:
    config = cli.parse(EvaluateConfig, argv)
    require_weights(Path(config.load.ckpt))
    text = find_text(config)
    # These import torch, which takes seconds: a wrong flag or --data is told before.
    from .inference.perplexity import FIGURES, evaluate
    from .inference.text_model import load_from

    loaded = load_from(config.load)
    model, tokenizer = loaded.model, loaded.tokenizer
    windows = config.context, config.stride, config.batch_size
    found = evaluate(model, tokenizer, text.documents(tokenizer), *windows, place=text.place)
    figures = {name: getattr(found, name) for name in FIGURES} | dataclasses.asdict(found)
    if config.json:
        print(json.dumps({"text": text.name, **figures}))
    else:
        print(f"text           {printable(text.name)}\n{describe(found, tokenizer)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
