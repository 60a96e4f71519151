"""Draw a run's training curve: ``python tools/plot.py runs/1 docs/curve.svg`` (extra: plot).

Of a round of rejection sampling it draws what the best of more and more answers scores.
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

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import tyro

from llama_common import cli
from llama_common.errors import InputError
from llama_common.files import require_writable
from tools.pictures import pyplot, save


@dataclass(frozen=True)
class PlotConfig:
    """Draw a run's training and validation loss, or a round's reward of the best of K answers."""

    command: ClassVar[str] = "python tools/plot.py"

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Run directory, or folder of a round of rejection sampling."""
    out: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PICTURE")]
    """File to write: .svg, .png or .pdf."""


def read_curve(run: Path, tag: str) -> tuple[list[int], list[float]]:
    """Return the steps and values of one scalar of a run.

    Raises InputError for a directory without it.
    """
    folder = _events_folder(run)
    # It takes a second to import: a wrong flag or directory is told before.
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    if tag not in events.Tags()["scalars"]:
        raise InputError(f"{folder}: holds no {tag}; train for longer")
    scalars = events.Scalars(tag)
    return [event.step for event in scalars], [event.value for event in scalars]


def _events_folder(run: Path) -> Path:
    """Return the directory of a run's TensorBoard files; InputError where there is none."""
    folder = run / "tensorboard"
    if not folder.is_dir():
        raise InputError(f"{folder}: no such directory; give the directory of a training run")
    return folder


def is_round(folder: Path) -> bool:
    """Return whether a folder is of a round of rejection sampling."""
    return (folder / "rejection.json").is_file()


def draw_losses(axes: Any, run: Path) -> None:
    """Draw a run's losses."""
    axes.plot(*read_curve(run, "train/loss"), color="#9ab", label="training")
    axes.plot(*read_curve(run, "val/loss"), color="#c33", marker="o", ms=4, label="validation")
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.set_ylim(bottom=0)


def draw_rewards(axes: Any, folder: Path) -> None:
    """Draw the mean reward of the best and of the median of K answers (the paper's figure 7)."""
    from llama_torch.rlhf.rejection_folder import read_samples
    from llama_torch.rlhf.rejection_table import best_of

    drawn = read_samples(folder, "RUN")
    rewards = [[sample.reward for sample in one.samples] for one in drawn]
    rows = best_of(rewards, range(1, min(map(len, rewards)) + 1))
    k = [row.samples for row in rows]
    axes.plot(k, [row.maximum for row in rows], color="#c33", marker="o", ms=4, label="maximum")
    axes.plot(k, [row.median for row in rows], color="#9ab", marker="o", ms=4, label="median")
    axes.set(xlabel="answers to a prompt", ylabel="reward, mean over prompts")


def draw(run: Path, out: Path) -> None:
    """Draw a run's losses, or a round's rewards, into ``out``, .svg, .png or .pdf."""
    figure, axes = pyplot().subplots(figsize=(7.2, 3.6), layout="constrained")
    (draw_rewards if is_round(run) else draw_losses)(axes, run)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    save(figure, out)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    return cli.run(lambda: _main(sys.argv[1:] if argv is None else argv))


def _main(argv: Sequence[str]) -> int:
    config = cli.parse(PlotConfig, argv)
    if Path(config.out).suffix not in (".svg", ".png", ".pdf"):
        raise InputError(f"{config.out}: the picture's name must end in .svg, .png or .pdf")
    require_writable(Path(config.out).resolve(), config.out)
    if not is_round(Path(config.run)):
        _events_folder(Path(config.run))  # told before matplotlib is imported, which takes a second
    draw(Path(config.run), Path(config.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
