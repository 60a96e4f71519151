"""Measure how many turns an instruction lasts: ``python tools/instruction_turns.py CKPT FILE``.

The dialogues are those of ``python tools/tasks.py``, each with a form that all answers are to have;
the checkpoint answers their questions one after another, greedily, amid its own answers.
"""

import signal
import sys
from pathlib import Path

if __name__ == "__main__":
    # Ctrl-C while modules are imported: see llama_common/interrupt.py. cli.run takes over.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    # The tools are not installed. Run as a script, their folder is on the path, where its parent
    # should be.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

import tyro

from llama_common import cli
from llama_common.errors import InputError, check_between
from llama_torch.checkpoint.weight_files import require_weights
from llama_torch.rlhf.dialogues import Place, messages_of
from tools.synthetic.lasting import Asked, Lasting, TurnShare, by_turn, lasting, read_dialogues

if TYPE_CHECKING:
    from llama_torch import TextModel

MOST_TOKENS = 4096


@dataclass(frozen=True)
class TurnsConfig:
    """Tell by turn the share of answers that keep an instruction given in the first one."""

    command: ClassVar[str] = "python tools/instruction_turns.py"

    ckpt: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CKPT")]
    """Model directory or training run directory."""
    dialogues: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")]
    """A file of dialogues, written by tools/tasks.py."""
    template: str = ""
    """Jinja file, or "llama2" for Llama 2's form; empty = the checkpoint's own template."""
    place: Place = "system"
    """Where the instruction stands: the system message, or the first user message."""
    every_turn: bool = False
    """Put the instruction to every user message, as it is while gatt draws answers."""
    turns: int = 0
    """Questions of a dialogue, at most; 0 = all."""
    limit: int = 0
    """The first so many dialogues; 0 = all."""
    max_new_tokens: int = 24
    """Tokens of an answer, at most."""
    batch_size: int = 32
    """Dialogues answered at once."""
    json: bool = False
    """Print the shares as JSON, instead of the table."""

    def __post_init__(self) -> None:
        check_between(
            self,
            ("turns", 0, 2**31),
            ("limit", 0, 2**31),
            ("max_new_tokens", 1, MOST_TOKENS),
            ("batch_size", 1, 4096),
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    return cli.run(lambda: _main(sys.argv[1:] if argv is None else argv))


def _main(argv: Sequence[str]) -> int:
    config = cli.parse(TurnsConfig, argv)
    asked = read_dialogues(Path(config.dialogues))[: config.limit or None]
    if not asked:
        raise InputError(f"{config.dialogues}: holds no dialogue")
    require_weights(Path(config.ckpt))
    from llama_torch import load  # imports torch, which takes seconds: what is wrong is told before

    model = load(config.ckpt, template=config.template)
    answers = converse(model, asked, config)
    turns, total = by_turn(asked, answers), lasting(asked, answers)
    if config.json:
        told = {"turns": [turn._asdict() for turn in turns], "lasting": total._asdict()}
        print(json.dumps(told, indent=1))
    else:
        _show(turns, total)
    return 0


def converse(model: "TextModel", asked: Sequence[Asked], config: TurnsConfig) -> list[list[str]]:
    """Return the greedy answers to each dialogue's questions, each given those before it."""
    from llama_torch import SamplingConfig

    settings = SamplingConfig(max_new_tokens=config.max_new_tokens, temperature=0)
    wanted = [one.questions[: config.turns or None] for one in asked]
    answers: list[list[str]] = [[] for _ in asked]
    for turn in range(max(map(len, wanted))):
        going_on = [i for i, questions in enumerate(wanted) if turn < len(questions)]
        prompts = [
            messages_of(
                asked[i].form.instruction, wanted[i], answers[i], config.place, config.every_turn
            )
            for i in going_on
        ]
        try:
            said = model.chat_batch(prompts, settings, max_rows=config.batch_size)
        except InputError as error:
            message = f"turn {turn + 1}: {error}; --turns {turn} asks fewer questions"
            raise InputError(message if turn else str(error)) from None
        for i, answer in zip(going_on, said, strict=True):
            answers[i].append(answer.text.strip())
    return answers


def _show(turns: Sequence[TurnShare], total: Lasting) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for heading in ("turn", "answers", "keep the form", "standard error", "and are right"):
        table.add_column(heading, justify="right")
    for one in turns:
        table.add_row(
            *(str(one.turn), str(one.number), f"{one.kept:.1%}"),
            *(f"{one.error:.1%}", f"{one.right:.1%}"),
        )
    console = Console(highlight=False)
    console.print(table)
    console.print(
        f"an instruction lasts {total.turns:.2f} turns of {turns[-1].turn} (standard error "
        f"{total.error:.2f}); {total.never_broken:.1%} of the dialogues never break it"
    )


if __name__ == "__main__":
    sys.exit(main())
