"""Start a job's processes as torchrun does, forked from one that has imported the program.

``python -m parity_tests.workers.launch WORLD MODULE ARGUMENTS...``: every process of torchrun's
imports torch for some seconds; these share it. A process that fails ends the others. Tests of
restarts and of signals use torchrun itself.
"""

import importlib
import os
import signal
import socket
import sys
from collections.abc import Callable

from llama_torch.distributed.job import exit_process


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
    """Import a command's module, and what it would import late; return its ``main``."""
    for late in ("torch.distributed.fsdp", "torch._dynamo"):  # an optimizer imports the second
        importlib.import_module(late)
    main: Callable[[], int] = importlib.import_module(module).main
    return main


def fork(rank: int, program: Callable[[], int]) -> int:
    """Begin one process of the job; return its number."""
    child = os.fork()
    if child == 0:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        exit_process(program)
    return child


if __name__ == "__main__":
    sys.exit(main())
