"""The flags of scaling.py, without PyTorch: a wrong one is told of at once."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from llama_common.errors import check, check_between

MOST_PROCESSES = 1024  # of one host
MOST_STEPS = 100_000  # more takes days


@dataclass(frozen=True)
class ScalingConfig:
    """Measure training on all GPUs of this host, beside one of them."""

    command: ClassVar[str] = "python tools/scaling.py"

    shapes: tuple[Literal["default", "15m", "124m", "1.1b", "7b"], ...] = ("1.1b", "7b")
    """Models to train; of one that needs shards on most GPUs, 7b, FSDP alone."""
    precisions: tuple[Literal["dtype", "fp8"], ...] = ("dtype", "fp8")
    """Precisions of the blocks' products; fp8 has no tensor parallelism."""
    layouts: tuple[Literal["ddp", "fsdp", "tp", "fsdp-tp"], ...] = ()
    """Ways to share a step: replicas, shards, tensor parallelism over all processes, or over two
    with shards over the rest; none = those that suit the shape and the number of processes."""
    processes: int = 0
    """Processes of a job; 0 = the number of GPUs (on a CPU 2)."""
    batch_size: int = 0
    """Windows of a step for each process; 0 = the shape's own number."""
    steps: int = 20
    """Steps whose losses are compared; as many are timed after them."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Precision of weights and activations."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run."""
    json: bool = False
    """Print the rows as JSON, instead of the table."""

    def __post_init__(self) -> None:
        check_between(
            self,
            ("processes", 0, MOST_PROCESSES),
            ("batch_size", 0, MOST_STEPS),
            ("steps", 1, MOST_STEPS),
        )
        check(self.processes != 1, "processes", 1, "must be 2 or more: one alone is every row's")
