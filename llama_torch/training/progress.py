"""Report a training run: a progress bar, log lines, and TensorBoard."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

import torch
from rich import progress as rich_progress
from rich.console import Console
from rich.markup import escape

from llama_common.errors import printable

from .clock import UNKNOWN_SPEED, TrainingClock, speed_of
from .objective import Measured, shown
from .run_dir import EVENTS_FOLDER
from .setup import Run
from .tensorboard import EventWriter
from .throughput import peak_memory, peak_tokens_per_second


class Progress:
    """Reports a run of ``last`` steps on the terminal and to TensorBoard.

    ``processes`` is the number of those that share out the windows.
    """

    def __init__(
        self,
        writer: EventWriter,
        first: int,
        last: int,
        processes: int,
        device: torch.device,
        tokens_per_second_at_peak: float,
        clock: TrainingClock,
    ) -> None:
        self.writer, self.processes, self.device = writer, processes, device
        self.tokens = 0  # of this process, in the time that ``clock`` has measured
        self.at_peak, self.clock = tokens_per_second_at_peak, clock
        self.console = Console(highlight=False)
        self.bar = rich_progress.Progress(
            rich_progress.TextColumn("training"),
            rich_progress.BarColumn(),
            rich_progress.MofNCompleteColumn(),
            rich_progress.TextColumn("{task.fields[loss]}"),
            rich_progress.TimeElapsedColumn(),
            rich_progress.TextColumn("ETA"),
            rich_progress.TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
            transient=True,
        )
        self.task = self.bar.add_task("", total=last, completed=first, loss="")

    def __enter__(self) -> "Progress":
        self.bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.bar.stop()

    def print_line(self, text: str) -> None:
        """Print one line above the bar."""
        self.console.print(escape(printable(text)), soft_wrap=True)

    def advance(self, step: int, tokens: int) -> None:
        """Set the bar to ``step`` steps done, the last with so many tokens in this process."""
        self.tokens += tokens
        self.bar.update(self.task, completed=step)

    def trained(
        self, step: int, loss: float, lr: float, norm: float, measures: Mapping[str, float]
    ) -> None:
        """Report loss (nats), the objective's measures, learning rate, norm, speed and memory."""
        values = {"loss": loss, **measures, "lr": lr, "grad_norm": norm}
        line = f"step {step:>5}  loss {loss:6.3f}{shown(measures)}  lr {lr:.2e}"
        line += f"  gradient norm {norm:6.3f}"
        tokens, seconds = self._take_time()
        if tokens:
            speed = speed_of(self.processes * tokens, seconds, self.at_peak)
            memory = peak_memory(self.device) / 2**30
            if speed is None:
                line += f"  {UNKNOWN_SPEED}"
            else:
                line += f"  {speed:,.0f} tokens/s  MFU {speed / self.at_peak:.1%}"
                values |= {"tokens_per_second": speed, "mfu": speed / self.at_peak}
            line += f"  {memory:.1f} GiB"
            values["peak_memory_gib"] = memory
        self.bar.update(self.task, loss=f"loss {loss:.3f}")
        self.print_line(line)
        for name, value in values.items():
            self.writer.add_scalar(f"train/{name}", value, step)

    def skipped(self, step: int, loss: float, norm: float, total: int) -> None:
        """Report a bad step whose update was skipped; ``total`` is their number so far."""
        self.print_line(f"step {step:>5}  loss {loss:.4g}  gradient norm {norm:.4g}  bad: skipped")
        self.writer.add_scalar("train/bad_steps", total, step)

    def compiled(self, step: int, seconds: float) -> None:
        """Report the first step of a compiled model; its time does not count in tokens/s."""
        self.print_line(f"step {step:>5}  the first one took {seconds:.0f} s, for compilation")
        self._take_time()

    def validated(self, step: int, measured: Measured) -> None:
        """Report the loss (nats) and the measures of a validation."""
        loss, values, _ = measured
        self.print_line(f"step {step:>5}  validation loss {loss:.3f}{shown(values)}")
        for name, value in {"loss": loss, **values}.items():
            self.writer.add_scalar(f"val/{name}", value, step)

    def verified(self, step: int, measures: Mapping[str, tuple[float, float]]) -> None:
        """Report errors against the oracle beside their bounds, by quantity."""
        shares = [f"{name} {error / bound:.0%}" for name, (error, bound) in measures.items()]
        self.print_line(
            f"step {step:>5}  verified: of the bounds of their errors, {', '.join(shares)}"
        )
        for name, (error, bound) in measures.items():
            self.writer.add_scalar(f"verify/{name}_error", error, step)
            self.writer.add_scalar(f"verify/{name}_bound", bound, step)

    def sampled(self, step: int, text: str) -> None:
        """Report a sample of text."""
        self.print_line(f"step {step:>5}  sample: {text!r}")
        self.writer.add_text("sample", text, step)

    def saved(self, step: int) -> None:
        """Report a complete checkpoint."""
        self.print_line(f"step {step:>5}  checkpoint saved")

    def _take_time(self) -> tuple[int, float]:
        """Return the tokens of this process and the seconds of training since the last call."""
        tokens, self.tokens = self.tokens, 0
        return tokens, self.clock.take()


class NullProgress:
    """A Progress that reports nothing, for every process but the main one."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *ignored: None


def open_progress(run: Run, clock: TrainingClock, exit_stack: ExitStack) -> Progress | NullProgress:
    """Return the Progress of a run, open until ``exit_stack`` closes; ``clock`` gives its speed.

    On other processes than the main one it is a NullProgress.
    """
    config, dtype = run.config, getattr(torch, run.config.dtype)
    at_peak = peak_tokens_per_second(
        run.multiplied, run.n_parameters, run.device, dtype, run.source.learnt_share
    )
    if not run.parallel.is_main_process:
        return NullProgress()
    folder = Path(config.out) / EVENTS_FOLDER
    first = run.steps_done + 1 if run.steps_done else 0
    writer = exit_stack.enter_context(EventWriter(folder, first))
    return exit_stack.enter_context(
        Progress(
            writer,
            run.steps_done,
            config.steps,
            run.parallel.data_size,
            run.device,
            run.parallel.world * at_peak,
            clock,
        )
    )
