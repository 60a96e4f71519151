"""Write text: ``python -m llama_torch.generate --ckpt DIR --prompt TEXT [TEXT ...]``."""

import io
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from .common import cli
from .common.errors import check, check_text
from .inference.completion import Completion
from .inference.config import PREFILL_CHUNK, DecodingConfig, LoadConfig, SamplingConfig, check_chunk
from .inference.text_model import TextModel, load_from


@dataclass(frozen=True)
class GenerateConfig:
    """Write text from a checkpoint."""

    load: LoadConfig
    prompt: tuple[str, ...]
    """Text to continue; several are continued together."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    decoding: DecodingConfig = field(default_factory=DecodingConfig)
    prefill_chunk: int = PREFILL_CHUNK
    """Tokens of the prompts read in one forward pass: less memory, the same answer."""
    json: bool = False
    """One JSON object a prompt: text, token ids, why it ended, log-probabilities."""

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
    model = load_from(config.load, decoding=config.decoding)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character
    if len(config.prompt) > 1 or config.json or config.sampling.logprobs >= 0:
        _write_all(model, config)
    else:
        _write_as_it_comes(model, config)
    return 0


def _write_as_it_comes(model: TextModel, config: GenerateConfig) -> None:
    ids = model.encode(config.prompt[0])
    pieces = model.stream_ids(ids, config.sampling, config.prefill_chunk)
    first = next(pieces, "")  # so that a refused prompt prints nothing else
    print(config.prompt[0] + first, end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()


def _write_all(model: TextModel, config: GenerateConfig) -> None:
    completions = model.generate_batch(config.prompt, config.sampling, config.prefill_chunk)
    for prompt, completion in zip(config.prompt, completions, strict=True):
        if config.json:
            print(json.dumps(_record(prompt, completion)))
            continue
        print(prompt + completion.text)
        for token in completion.tokens if config.sampling.logprobs >= 0 else ():
            top = ", ".join(f"{_show(model, i)} {p:.3f}" for i, p in token.top_logprobs)
            print(f"{token.logprob:9.3f}  {_show(model, token.id)}  [{top}]")
        print()


def _show(model: TextModel, id_: int) -> str:
    return model.tokenizer.names.get(id_) or repr(model.tokenizer.decode([id_]))


def _record(prompt: str, completion: Completion) -> dict[str, object]:
    return {
        "prompt": prompt,
        "text": completion.text,
        "finish_reason": completion.finish_reason,
        "token_ids": [token.id for token in completion.tokens],
        "logprobs": [token.logprob for token in completion.tokens],
        "likeliest": [list(token.top_logprobs) for token in completion.tokens],
    }


if __name__ == "__main__":
    sys.exit(main())
