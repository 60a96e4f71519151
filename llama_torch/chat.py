"""Chat with a checkpoint in a terminal: ``python -m llama_torch.chat --ckpt DIR``."""

import contextlib
import dataclasses
import io
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from llama_common import cli
from llama_common.errors import InputError, check_text

from .checkpoint.weight_files import require_weights
from .inference.config import DecodingConfig, LoadConfig, SamplingConfig

if TYPE_CHECKING:
    from .inference.text_model import TextModel
    from .tokenizer.chat_template import Message

HELP = "/reset forgets the conversation, /exit (or Ctrl-D) leaves, Ctrl-C ends an answer"


@dataclass(frozen=True)
class ChatConfig:
    """Chat with a checkpoint: /reset forgets, /exit leaves, Ctrl-C ends an answer."""

    command: ClassVar[str] = "python -m llama_torch.chat"
    basic: ClassVar[str] = (
        "ckpt system template max_new_tokens temperature top_k top_p seed device dtype quantize"
    )

    load: LoadConfig
    system: str = ""
    """System message, the first of the conversation; empty = none."""
    template: str = ""
    """Jinja file, or "llama2" for Llama 2's [INST] form; empty = the checkpoint's own template."""
    sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(max_new_tokens=512))
    decoding: DecodingConfig = field(default_factory=DecodingConfig)

    def __post_init__(self) -> None:
        if self.system:
            check_text("system", self.system)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    return cli.run(lambda: _main(sys.argv[1:] if argv is None else argv))


def _main(argv: Sequence[str]) -> int:
    config = cli.parse(ChatConfig, argv)
    if config.template not in ("", "llama2") and not Path(config.template).exists():
        raise InputError(
            f"--template {config.template}: no such file; give a Jinja file, or llama2"
        )
    for path in filter(None, (config.load.ckpt, config.decoding.draft)):
        require_weights(Path(path))
    from .inference.text_model import load_from  # imports torch: what is wrong is told before

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (gives input() line editing and a history)
    for stream in (sys.stdin, sys.stdout):  # of characters that the terminal's encoding lacks
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    model = load_from(config.load, config.template, config.decoding)
    model.chat_template  # noqa: B018  (a checkpoint without one is refused before the prompt)
    print(HELP)
    return Conversation(model, config).run()


class Conversation:
    """Messages of a conversation in the terminal, and the loop that reads and answers."""

    def __init__(self, model: "TextModel", config: ChatConfig) -> None:
        self.model, self.config = model, config
        system = {"role": "system", "content": config.system}
        self.start: list[Message] = [system] if config.system else []
        self.messages = list(self.start)
        self.turn = 0

    def run(self) -> int:
        """Read messages and print answers until the user leaves; return the exit code."""
        while True:
            try:
                said = input("> ").strip()
            except (EOFError, RuntimeError):  # RuntimeError: the process has no stdin
                print()
                return 0
            except KeyboardInterrupt:
                print()
                continue
            if said == "/exit":
                return 0
            if said == "/reset":
                self.messages = list(self.start)
                print("(forgotten)")
            elif said:
                self._exchange(said)

    def _exchange(self, said: str) -> None:
        """Print the answer to a message; drop a refused message, keep an interrupted answer."""
        answer = ""
        try:
            messages, ids = self._fitting([*self.messages, {"role": "user", "content": said}])
            # Another seed each turn, so that the same question may get another answer.
            sampling = self.config.sampling
            sampling = dataclasses.replace(sampling, seed=(sampling.seed + self.turn) % 2**63)
            self.turn += 1
            for piece in self.model.stream_ids(ids, sampling):
                print(piece, end="", flush=True)
                answer += piece
        except InputError as error:
            cli.complain(error)
            return
        except KeyboardInterrupt:
            print(" (interrupted)", end="")
        print()
        self.messages = [*messages, {"role": "assistant", "content": answer}]

    def _fitting(self, messages: "list[Message]") -> "tuple[list[Message], list[int]]":
        """Return the messages and their token ids, without the oldest exchanges if they do not fit.

        They fit if they leave ``max_new_tokens`` or a quarter of the context for the answer. Raises
        InputError where the last message alone fills the context.
        """
        from .inference.rows import require_fitting

        limit, oldest = self.model.model.config.max_seq_len, len(self.start)
        room = min(self.config.sampling.max_new_tokens, limit // 4)
        kept = list(messages)
        while True:
            ids = self.model.chat_template.encode(kept)
            if len(ids) + room <= limit or len(kept) <= oldest + 1:
                break
            del kept[oldest : oldest + 2]
        require_fitting(self.model.model, ids)
        if dropped := (len(messages) - len(kept)) // 2:
            print(f"(forgot the oldest {dropped}: the context holds {limit} tokens)")
        return kept, ids


if __name__ == "__main__":
    sys.exit(main())
