"""Write conversations about tasks with known answers: ``python tools/tasks.py FOLDER``.

Sorting, addition, words in reverse, counting, one of two names, questions to refuse, and
instructions on the form of answers that hold in every turn: what fine-tuning needs, and what
measures it, without a network.
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
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, ClassVar

import tyro

from llama_common import cli
from llama_common.errors import InputError, check_between
from llama_common.files import new_folder, write_text
from tools.synthetic import records
from tools.synthetic.tasks import FORMS

INSTRUCTIONS = "instructions.txt"  # on the form of answers, one a line
MOST = 10_000_000  # records of a file; more takes hours
MOST_TURNS = 100


@dataclass(frozen=True)
class TasksConfig:
    """Write synthetic conversations, pairs of answers, and prompts with their right answers."""

    command: ClassVar[str] = "python tools/tasks.py"

    out: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    """Folder to make; {conversations,pairs,prompts,dialogues}.jsonl, each also held-out-, and
    instructions.txt."""
    conversations: int = 20_000
    """Conversations to fine-tune on."""
    pairs: int = 10_000
    """Prompts with a chosen and a rejected answer."""
    prompts: int = 5_000
    """Prompts to answer."""
    dialogues: int = 1_000
    """Conversations without a form, each with one to ask for: for tools/instruction_turns.py."""
    held_out: int = 500
    """Records of each kind that end in a question which is never trained on; of a dialogue no
    question is."""
    turns: int = 3
    """Exchanges of a conversation, at most."""
    dialogue_turns: int = 8
    """Exchanges of each dialogue."""
    form_in: records.Place = "system"
    """The message with the instruction on the form of answers: system, the first user one, or every
    user one."""
    seed: int = 0
    """Seed of all that is drawn."""

    def __post_init__(self) -> None:
        check_between(
            self,
            ("conversations", 0, MOST),
            ("pairs", 0, MOST),
            ("prompts", 0, MOST),
            ("dialogues", 0, MOST),
            ("held_out", 0, MOST),
            ("turns", 1, MOST_TURNS),
            ("dialogue_turns", 1, MOST_TURNS),
            ("seed", 0, 2**63 - 1),
        )


def write(config: TasksConfig) -> list[Path]:
    """Write the files of a new folder; return their paths."""
    out = Path(config.out)
    if out.exists():
        raise InputError(f"{out}: is there already; name a new folder")
    kinds: dict[str, tuple[Callable[..., Iterator[records.Record]], int, int]] = {
        name: (partial(draw, place=config.form_in), number, config.turns)
        for name, draw, number in (
            ("conversations", records.conversations, config.conversations),
            ("pairs", records.pairs, config.pairs),
            ("prompts", records.prompts, config.prompts),
        )
    }
    kinds["dialogues"] = records.dialogues, config.dialogues, config.dialogue_turns
    names = []
    with new_folder(out) as folder:
        for name, (draw, number, turns) in kinds.items():
            # A generator for each file: the number of records of one changes no other.
            rng = random.Random(f"{config.seed} {name}")
            _write_lines(folder / f"{name}.jsonl", draw(rng, number, turns))
            rng = random.Random(f"{config.seed} held out {name}")
            held_out = draw(rng, config.held_out, turns, True)
            _write_lines(folder / f"held-out-{name}.jsonl", held_out)
            names += [f"{name}.jsonl", f"held-out-{name}.jsonl"]
        told = "".join(f"{form.instruction}\n" for form in FORMS)
        write_text(folder / INSTRUCTIONS, told)
    return [out / name for name in [*names, INSTRUCTIONS]]


def _write_lines(path: Path, values: Iterable[Any]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for value in values:
            file.write(json.dumps(value) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    return cli.run(lambda: _main(sys.argv[1:] if argv is None else argv))


def _main(argv: Sequence[str]) -> int:
    for path in write(cli.parse(TasksConfig, argv)):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
