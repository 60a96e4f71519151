"""``--profile``: write torch's profile of a few training steps."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch.profiler import profile, schedule

TRACE_FILE = "trace.json"

PROFILED_STEPS = 3


@contextmanager
def profiling(
    out: Path, steps: int, print_line: Callable[[str], None]
) -> Iterator[Callable[[object], None]]:
    """Profile some of ``steps`` training steps into ``out``/trace.json.

    Yields the function to call after each training step.
    """
    path = out / TRACE_FILE

    def save(profiler: profile) -> None:
        profiler.export_chrome_trace(str(path))
        print_line(f"trace of {PROFILED_STEPS} steps in {path}; ui.perfetto.dev opens it")

    # The first steps compile and allocate.
    wait = max(0, min(5, steps - PROFILED_STEPS - 1))
    when = schedule(wait=wait, warmup=1, active=PROFILED_STEPS, repeat=1)
    # One cycle, so that acc_events changes nothing but a warning that events are not added up.
    with profile(schedule=when, on_trace_ready=save, acc_events=True) as profiler:
        yield lambda done: profiler.step()
