"""Run a job's processes as torchrun does, as forks of one that has imported the program.

``python -m parity_tests.workers.launch WORLD MODULE ARGUMENTS...``: torchrun's processes each
import torch for some seconds; forks share it. A process that fails ends the others. Tests of
restarts and of signals use torchrun itself.
"""

import importlib
import os
import signal
import socket
import sys
from collections.abc import Callable
from unittest.mock import patch

from llama_torch.common.torchrun import exit_process
from llama_torch.tokenizer.gpt2 import hf_files
from llama_torch.training import throughput


def main() -> int:
    """Fork the processes; return 0, or the exit code of the first one that failed."""
    world, module, *arguments = sys.argv[1:]
    program = import_program(module)
    sys.argv[1:] = arguments
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": world}
    os.environ |= {"LOCAL_WORLD_SIZE": world, "TORCHELASTIC_RUN_ID": f"launch-{os.getpid()}"}
    children = {fork(rank, program) for rank in range(int(world))}
    failed = 0
    while children:
        child, status = os.wait()
        children.remove(child)
        code = os.waitstatus_to_exitcode(status)
        if code and not failed:
            failed = code if code > 0 else 1
            for other in children:
                os.kill(other, signal.SIGTERM)
    return failed


def import_program(module: str) -> Callable[[], int]:
    """Import a command's module, and all that its forks would import; return its ``main``."""
    main: Callable[[], int] = importlib.import_module(module).main
    import_late("llama_torch.checkpoint.shards", "llama_torch.distributed.job")
    if "llama_torch.train" in sys.modules:
        import_late("llama_torch.training.loop", "llama_torch.training.dry_run")
        import_late("llama_torch.training.shard_saver", "llama_torch.training.verify")
        share_constants()
    return main


def import_late(*more: str) -> None:
    """Import the modules that a trainer imports late: its first optimizer imports torch._dynamo."""
    for module in ("torch._dynamo", "torch.distributed.fsdp", *more):
        importlib.import_module(module)


def share_constants() -> None:
    """Compute GPT-2's files and fix the machine's speed: one CPU second of each trainer."""
    hf_files()
    patch.object(throughput, "peak_flops", lambda *_: 1e9).start()


def fork(rank: int, program: Callable[[], int]) -> int:
    """Fork one process of the job; return its process id."""
    child = os.fork()
    if child == 0:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        exit_process(program)
    return child


if __name__ == "__main__":
    sys.exit(main())
