"""``--profile``: torch's profiler over a few training steps, written as a Chrome trace."""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from torch.profiler import profile, schedule

from llama_common.files import atomic_write

from .clock import TrainingClock

TRACE_FILE = "trace.json"  # in the run directory

PROFILED_STEPS = 3


@contextmanager
def profiling(
    out: Path, steps: int, clock: TrainingClock, print_line: Callable[[str], None]
) -> Iterator[Callable[[object], None]]:
    """Profile PROFILED_STEPS of ``steps`` training steps; write ``out``/trace.json.

    Yields a function to call after every training step, with anything as its argument. It stops
    ``clock`` while the profiler begins and ends, and writes.
    """
    path = out / TRACE_FILE

    def save(profiler: profile) -> None:
        atomic_write(path, lambda temporary: profiler.export_chrome_trace(str(temporary)))
        print_line(f"trace of {PROFILED_STEPS} steps in {path}; ui.perfetto.dev opens it")

    # Not the first steps, which compile and allocate.
    wait = max(0, min(5, steps - PROFILED_STEPS - 1))
    when = schedule(wait=wait, warmup=1, active=PROFILED_STEPS, repeat=1)
    # With one cycle acc_events has no effect but to silence a warning that cycles are not summed.
    with profile(schedule=when, on_trace_ready=save, acc_events=True) as profiler:
        numbers = itertools.count()

        def step(done: object) -> None:
            number = next(numbers)
            with nullcontext() if when(number) == when(number + 1) else clock.stopped():
                profiler.step()

        yield step
