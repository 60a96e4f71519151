"""Generate text: ``python -m llama_torch.generate --ckpt DIR --prompt TEXT [TEXT ...]``."""

import io
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from llama_common import cli
from llama_common.errors import check, check_text, printable

from .checkpoint.weight_files import require_weights
from .inference.config import PREFILL_CHUNK, DecodingConfig, LoadConfig, SamplingConfig, check_chunk

if TYPE_CHECKING:
    from .inference.completion import Completion
    from .inference.text_model import TextModel


@dataclass(frozen=True)
class GenerateConfig:
    """Generate text from a checkpoint."""

    command: ClassVar[str] = "python -m llama_torch.generate"
    basic: ClassVar[str] = (
        "ckpt prompt max_new_tokens temperature top_k top_p seed stop device dtype quantize json"
    )

    load: LoadConfig
    prompt: tuple[str, ...]
    """Prompts: texts to continue, together if there are several."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    decoding: DecodingConfig = field(default_factory=DecodingConfig)
    prefill_chunk: int = PREFILL_CHUNK
    """Prompt tokens in one forward pass; fewer take less memory, for the same answer."""
    json: bool = False
    """Print a JSON object for each prompt: text, finish reason, token ids; with --logprobs those
    too."""

    def __post_init__(self) -> None:
        check(bool(self.prompt), "prompt", self.prompt, "must not be empty")
        for prompt in self.prompt:
            check_text("prompt", prompt)
        check_chunk(self.prefill_chunk)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    return cli.run(lambda: _main(sys.argv[1:] if argv is None else argv))


def _main(argv: Sequence[str]) -> int:
    config = cli.parse(GenerateConfig, argv)
    for path in filter(None, (config.load.ckpt, config.decoding.draft)):
        require_weights(Path(path))
    from .inference.text_model import load_from  # imports torch: what is wrong is told before

    model = load_from(config.load, decoding=config.decoding)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character
    if len(config.prompt) > 1 or config.json or config.sampling.logprobs >= 0:
        _print_all(model, config)
    else:
        _stream_one(model, config)
    return 0


def _stream_one(model: "TextModel", config: GenerateConfig) -> None:
    """Print one prompt and its completion, piece by piece."""
    ids = model.encode(config.prompt[0])
    pieces = model.stream_ids(ids, config.sampling, config.prefill_chunk)
    first = next(pieces, "")  # a prompt that is refused prints no more than the error
    print(config.prompt[0] + first, end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()


def _print_all(model: "TextModel", config: GenerateConfig) -> None:
    """Print all completions, as JSON or as text with a line for each token's log-probabilities."""
    completions = model.generate_batch(config.prompt, config.sampling, config.prefill_chunk)
    for prompt, completion in zip(config.prompt, completions, strict=True):
        if config.json:
            print(json.dumps(_record(prompt, completion, config.sampling.logprobs)))
            continue
        print(prompt + completion.text)
        for token in completion.tokens if config.sampling.logprobs >= 0 else ():
            top = ", ".join(f"{_show(model, i)} {p:.3f}" for i, p in token.top_logprobs)
            print(f"{token.logprob:9.3f}  {_show(model, token.id)}  [{top}]")
        print()


def _show(model: "TextModel", id_: int) -> str:
    """Return a token as text: a special token's name, or the quoted text of another."""
    return printable(model.tokenizer.names.get(id_, "")) or repr(model.tokenizer.decode([id_]))


def _record(prompt: str, completion: "Completion", n_logprobs: int) -> dict[str, object]:
    """Return the JSON object of one completion; log-probabilities where they were asked for."""
    record: dict[str, object] = {
        "prompt": prompt,
        "text": completion.text,
        "finish_reason": completion.finish_reason,
        "token_ids": [token.id for token in completion.tokens],
    }
    if n_logprobs >= 0:
        record["logprobs"] = [token.logprob for token in completion.tokens]
    if n_logprobs > 0:
        record["likeliest"] = [list(token.top_logprobs) for token in completion.tokens]
    return record


if __name__ == "__main__":
    sys.exit(main())
