"""Measure speed beside other programs, alternately in one run: ``python tools/bench.py``.

All sides have the same shape, weights, dtype, threads and tokens, and are called in turn. A speed
is the median of several repeats, and a ratio the median of the ratios within a repeat, so that a
drift of the machine's speed cancels. Training runs in processes of its own (training.py); its table
has each side's memory and our model FLOPs utilisation. In the other table the last column is our
speed as a fraction of a limit measured in the same run: for decoding the memory's speed (bytes of
the matrices read per second, from the first new token to the last, beside those of a
matrix-vector product), for other works the speed of their matrix products alone.
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
from typing import ClassVar, Literal

from llama_common import cli
from llama_common.errors import InputError, check, check_between

ON_CPU = ("train", "decode", "bfloat16", "prefill", "batch8", "numpy-prefill", "numpy-decode")
ON_CUDA = ("train", "decode", "prefill", "batch32", "int8")
Work = Literal[
    "train",
    "sft",
    "reward",
    "decode",
    "bfloat16",
    "prefill",
    "batch8",
    "batch32",
    "int8",
    "numpy-prefill",
    "numpy-decode",
]
MOST_THREADS = 1024
MOST_TOKENS = 8192  # decoded after a prompt; more takes hours
MOST_REPEATS = 100_000  # more takes days


@dataclass(frozen=True)
class BenchConfig:
    """Measure speed beside transformers, llama.cpp and a plain NumPy Llama."""

    command: ClassVar[str] = "python tools/bench.py"
    basic: ClassVar[str] = (
        "works shape repeats batch_size new_tokens dtype precision device threads json"
    )

    works: tuple[Work, ...] = ()
    """Works to measure; none = the device's."""
    shape: Literal["default", "15m", "124m", "135m", "1.1b", "7b"] = "default"
    """Model of all works but NumPy's: the 15m one."""
    repeats: int = 7
    """Timed repeats of each side; on CUDA thrice as many training steps."""
    batch_size: int = 0
    """Windows in a training step; 0 = the shape's own number."""
    new_tokens: int = 128
    """Tokens decoded after a prompt of as many."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of weights and activations; training on CUDA is in bfloat16 always."""
    precision: Literal["dtype", "fp8"] = "dtype"
    """Precision of our blocks' matrix products in training: fp8 has our own training in --dtype
    for a peer too."""
    moments: Literal["float32", "bfloat16"] = "float32"
    """Precision in which our training keeps its moments; in bfloat16 our own training in --dtype,
    with float32 moments, is a peer too."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run; NumPy's works stay on the CPU."""
    threads: int = 0
    """Threads of every side on the CPU; 0 = torch's own number."""
    compiled_peer: bool = False
    """Decode with transformers' static cache, compiled, too: minutes more (CUDA)."""
    ours_alone: bool = False
    """Train without other libraries: our step, and what our own step is compared with."""
    json: bool = False
    """Print the rows as JSON, instead of the table."""

    def __post_init__(self) -> None:
        check_between(
            self,
            ("repeats", 1, MOST_REPEATS),
            ("new_tokens", 2, MOST_TOKENS),
            ("threads", 0, MOST_THREADS),
        )
        check(self.batch_size >= 0, "batch_size", self.batch_size, "must be at least 0")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    return cli.run(lambda: _main(sys.argv[1:] if argv is None else argv))


def _main(argv: Sequence[str]) -> int:
    return _measure(cli.parse(BenchConfig, argv))


def _measure(config: BenchConfig) -> int:
    # These import torch, which takes seconds: a wrong flag is told before.
    import torch
    from rich.console import Console

    from llama_torch.common.device import pick_device
    from tools.benchmarks.tables import show
    from tools.benchmarks.timing import Setup, SpeedRow
    from tools.benchmarks.training import TrainRow
    from tools.benchmarks.works import WORKS

    device = pick_device(config.device)
    if config.threads:
        torch.set_num_threads(config.threads)
    if config.compiled_peer and device.type != "cuda":
        raise InputError("--compiled-peer: transformers compiles on CUDA alone; leave it out")
    works = config.works or (ON_CUDA if device.type == "cuda" else ON_CPU)
    setup = Setup(
        config.shape,
        config.dtype,
        device,
        config.repeats,
        config.batch_size,
        config.new_tokens,
        config.compiled_peer,
        config.precision,
        config.moments,
        config.ours_alone,
    )
    console = Console(stderr=True)
    rows: list[SpeedRow | TrainRow] = []
    for work in works:
        with console.status(work):  # shown on a terminal
            rows += WORKS[work](setup)
    if config.json:
        print(json.dumps([row._asdict() for row in rows], indent=1))
    else:
        show(rows, setup)
    return 0


if __name__ == "__main__":
    sys.exit(main())
