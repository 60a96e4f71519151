"""Measure training on the GPUs of one host: ``python tools/scaling.py``, whatever their number.

Each row is a job of torchrun that takes the trainer's own steps, without data or checkpoints: one
way to share a step among processes, in one precision. Beside its speed stand the multiple of one
GPU's speed with the same windows a GPU, and the largest difference of a loss from that GPU's on the
windows of all.
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

from llama_common import cli
from tools.benchmarks.scaling_config import ScalingConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    return cli.run(lambda: _main(sys.argv[1:] if argv is None else argv))


def _main(argv: Sequence[str]) -> int:
    config = cli.parse(ScalingConfig, argv)
    # These import torch, which takes seconds: a wrong flag is told before.
    from tools.benchmarks.scaling import measure, table

    rows = measure(config)
    if config.json:
        print(json.dumps([row._asdict() for row in rows], indent=1))
    else:
        from rich.console import Console

        console = Console(highlight=False)
        console.width = max(console.width, 110) if not console.is_terminal else console.width
        console.print(table(rows))
    return 1 if any(row.speed is None for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
