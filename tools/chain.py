"""Make a chat model from nothing, stage by stage: ``python tools/chain.py FOLDER``.

Base model, fine-tuning, reward model, rejection sampling, PPO and Ghost Attention, on the tasks of
tools/tasks.py, whose right answers are known. Each stage is a command, printed before it runs; the
models that answer are measured after it.
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
import shlex
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import tyro

from llama_common import cli
from llama_common.errors import InputError, check, printable
from tools.pictures import pyplot, save
from tools.synthetic import progress
from tools.synthetic.progress import Measured
from tools.synthetic.stages import ANSWERING, COMMANDS, TASKS, Stage, stages, tasks_words

ROOT = Path(__file__).resolve().parent.parent
RECORD, PICTURE = "stages.json", "stages.svg"
MOST_SEEDS = 100
DIALOGUES = 200  # that are measured after each stage


@dataclass(frozen=True)
class ChainConfig:
    """Make chat models of small models, and measure what each stage adds."""

    command: ClassVar[str] = "python tools/chain.py"

    folder: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    """Folder of all that is made. What a stage that was stopped had made is made again."""
    seeds: int = 1
    """Number of chains: each has a seed of its own, of all but the tasks."""
    first_seed: int = 0
    """Seed of the first chain; those after it count up."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run."""
    until: str = ""
    """The last stage to run; empty = all."""
    show: bool = False
    """Print the commands, and run none."""

    def __post_init__(self) -> None:
        check(1 <= self.seeds <= MOST_SEEDS, "seeds", self.seeds, "must lie between 1 and 100")
        first = self.first_seed
        check(0 <= first < 2**31, "first_seed", first, "must lie between 0 and 2^31 - 1")
        if self.until and self.until not in COMMANDS:
            raise InputError(f"--until {self.until}: choose one of {', '.join(COMMANDS)}")

    def each_seed(self) -> range:
        """Return the seeds of the chains."""
        return range(self.first_seed, self.first_seed + self.seeds)

    def stages(self, seed: int) -> list[Stage]:
        """Return the stages to run with a seed."""
        found = stages(self.folder, seed, self.device)
        names = [stage.name for stage in found]
        return found[: names.index(self.until) + 1] if self.until else found


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    return cli.run(lambda: _main(sys.argv[1:] if argv is None else argv))


def _main(argv: Sequence[str]) -> int:
    config = cli.parse(ChainConfig, argv)
    if config.show:
        of_seeds = (stage.words for seed in config.each_seed() for stage in config.stages(seed))
        print("\n".join(map(shlex.join, [tasks_words(config.folder), *of_seeds])))
        return 0
    folder = Path(config.folder)
    if folder.exists() and not (folder / TASKS).is_dir():
        raise InputError(f"{folder}: is no folder of a chain; name a new one")
    if not folder.exists():
        run(tasks_words(config.folder))
    for seed in config.each_seed():
        run_seed(config, seed)
    found = progress.read(folder / RECORD)
    draw(found, folder / PICTURE)
    print(progress.table(found))
    return 0


def run_seed(config: ChainConfig, seed: int) -> None:
    """Run the stages of a seed that are not recorded, and record and measure them."""
    folder = Path(config.folder)
    every = config.stages(seed)
    for stage in every:
        found = progress.read(folder / RECORD)
        if not any((one.seed, one.stage) == (seed, stage.name) for one in found):
            made = folder / str(seed) / stage.name
            if made.exists():
                print(f"{printable(str(made))} is not whole, and is made again", flush=True)
                shutil.rmtree(made)
            start = time.perf_counter()
            run(stage.words)
            found.append(Measured(seed, stage.name, time.perf_counter() - start))
            progress.write(folder / RECORD, found)
        # The models before the reward model wait for it: it scores their answers too.
        if (folder / str(seed) / "reward").exists() or stage is every[-1]:
            measure(found, folder, seed)


def measure(found: list[Measured], folder: Path, seed: int) -> None:
    """Measure the answers of a seed's models that have not been, in ``found`` and its file."""
    for i, one in enumerate(found):
        if one.seed == seed and one.stage in ANSWERING and one.right is None:
            found[i] = measured(one, folder)
            progress.write(folder / RECORD, found)
            print(progress.table([found[i]]), flush=True)


def run(words: Sequence[str]) -> None:
    """Print and run a command; InputError where it fails, which its own message explains."""
    line = shlex.join(words)
    print(f"$ {line}", flush=True)
    if code := subprocess.run(located(words), check=False).returncode:
        raise InputError(f"this command ended with exit code {code}: {line}")


def measured(one: Measured, folder: Path) -> Measured:
    """Return a stage's record with what its model's answers are worth."""
    own, tasks = folder / str(one.seed), folder / TASKS
    reward = ["--reward", str(own / "reward")] if (own / "reward").exists() else []
    template = ["--template", "llama2"] if one.stage == "base" else []  # it has none of its own
    model, prompts, dialogues = (
        *(str(own / one.stage), str(tasks / "held-out-prompts.jsonl")),
        str(tasks / "held-out-dialogues.jsonl"),
    )
    shares = answer("tools/right_answers.py", model, prompts, *reward, *template)
    lasting = answer(
        *("tools/instruction_turns.py", model, dialogues),
        *("--place", "user", "--turns", "6", "--limit", str(DIALOGUES), *template),
    )
    of_all = shares[0]
    turns = lasting["lasting"]["turns"]
    return one._replace(right=of_all["right"], reward=of_all["reward"], turns=turns)


def draw(found: Sequence[Measured], out: Path) -> None:
    """Draw every measure by stage, with its standard error over the seeds, into ``out``."""
    figure, every_axes = pyplot().subplots(
        1, len(progress.COLUMNS), figsize=(10, 3.2), layout="constrained"
    )
    for axes, column in zip(every_axes, progress.COLUMNS, strict=True):
        _draw_column(axes, progress.by_stage(found, column.name), column)
    save(figure, out)


def _draw_column(axes: Any, values: dict[str, list[float]], column: progress.Column) -> None:
    means = [progress.mean_and_error(of_seeds) for of_seeds in values.values()]
    places = range(len(means))
    axes.errorbar(places, *zip(*means, strict=True), color="#c33", marker="o", ms=4, capsize=3)
    for place, of_seeds in zip(places, values.values(), strict=True):
        axes.plot([place] * len(of_seeds), of_seeds, ".", color="#9ab", zorder=0)
    axes.set_xticks(places, list(values), rotation=30)
    axes.set_title(column.label, fontsize=10)
    axes.grid(alpha=0.3)
    axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))


def answer(*words: str) -> Any:
    """Return what one of the tools prints as JSON."""
    command = ["python", *words, "--json"]
    done = subprocess.run(located(command), check=False, stdout=subprocess.PIPE)
    if done.returncode:
        line = shlex.join(command)
        raise InputError(f"this command ended with exit code {done.returncode}: {line}")
    return json.loads(done.stdout)


def located(words: Sequence[str]) -> list[str]:
    """Return a command's words with this Python, and the tools' script by its path."""
    scripts = [str(ROOT / word) if word.startswith("tools/") else word for word in words[1:]]
    return [sys.executable, *scripts]


if __name__ == "__main__":
    sys.exit(main())
