"""Talking with a checkpoint in a terminal: ``python -m llama_torch.chat --ckpt DIR``."""

import contextlib
import dataclasses
import io
import sys
from collections.abc import Sequence

from . import cli
from .chat_template import Message
from .config import ChatConfig, InputError
from .text_model import TextModel, load_from

HELP = "/reset forgets the conversation, /exit (or Ctrl-D) leaves, Ctrl-C ends an answer"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    return cli.run(lambda: _main(sys.argv[1:] if argv is None else argv))


def _main(argv: Sequence[str]) -> int:
    config = cli.parse(ChatConfig, argv)
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (gives input() line editing and a history)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    model = load_from(config.load, config.template)
    model.chat_template  # noqa: B018  (a checkpoint without one is refused before the first word)
    print(HELP)
    return Conversation(model, config).run()


class Conversation:
    """The messages so far, and a loop that adds to them."""

    def __init__(self, model: TextModel, config: ChatConfig) -> None:
        self.model, self.config = model, config
        system = {"role": "system", "content": config.system}
        self.start: list[Message] = [system] if config.system else []
        self.messages = list(self.start)
        self.turn = 0

    def run(self) -> int:
        """Read, answer, repeat; return the exit code."""
        while True:
            try:
                said = input("> ").strip()
            except EOFError:
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
        """Answer; a refused message is forgotten, an interrupted answer is kept as it is."""
        self.messages.append({"role": "user", "content": said})
        answer = ""
        try:
            ids = self._fitting()
            # Another seed each turn, so that asking again may give another answer.
            sampling = self.config.sampling
            sampling = dataclasses.replace(sampling, seed=(sampling.seed + self.turn) % 2**63)
            self.turn += 1
            for piece in self.model.stream_ids(ids, sampling):
                print(piece, end="", flush=True)
                answer += piece
        except InputError as error:
            del self.messages[-1]
            print(f"error: {error}", file=sys.stderr)
            return
        except KeyboardInterrupt:
            print(" (interrupted)", end="")
        print()
        self.messages.append({"role": "assistant", "content": answer})

    def _fitting(self) -> list[int]:
        """Encode the conversation, without its oldest exchanges where they leave no room."""
        limit = self.model.model.config.max_seq_len
        dropped = 0
        while True:
            ids = self.model.chat_template.encode(self.messages)
            room = min(self.config.sampling.max_new_tokens, limit // 4)
            oldest = len(self.start)
            if len(ids) + room <= limit or len(self.messages) <= oldest + 1:
                break
            del self.messages[oldest : oldest + 2]
            dropped += 1
        if dropped:
            print(f"(forgot the oldest {dropped}: the context holds {limit} tokens)")
        return ids


if __name__ == "__main__":
    sys.exit(main())
