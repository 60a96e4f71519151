"""Run a module under two agents of torchrun on this machine, as on two hosts.

``python -m parity_tests.workers.two_agents WORD MODULE ARGUMENTS...``: each agent has one process.
Both agents' output is printed, and the exit code is the first agent's. Once a line of it holds
WORD, unless that is empty, the second agent and its process are killed, as with their machine.
"""

import os
import signal
import socket
import subprocess
import sys
import threading
from typing import IO


def main() -> int:
    """Run the agents until the first one ends; return its exit code."""
    word, *command = sys.argv[1:]
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    torchrun = "-m", "parity_tests.workers.torchrun"
    flags = "--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d"
    flags = *flags, "--rdzv-endpoint", f"localhost:{port}", "--rdzv-id", "two"
    agents = [
        subprocess.Popen(
            [sys.executable, *torchrun, *flags, "-m", *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for _ in range(2)
    ]
    readers = [
        threading.Thread(target=relay, args=(agent.stdout, word, agents[1])) for agent in agents
    ]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    agents[1].wait()
    return agents[0].wait()


def relay(output: IO[str], word: str, victim: subprocess.Popen[str]) -> None:
    """Print an agent's output; kill the victim and its children where a line holds ``word``."""
    for line in output:
        print(line, end="", flush=True)
        if word and word in line:
            for pid in [*children(victim.pid), victim.pid]:
                os.kill(pid, signal.SIGKILL)


def children(parent: int) -> list[int]:
    """Return the process ids of a process's children."""
    path = f"/proc/{parent}/task/{parent}/children"
    with open(path) as file:
        return [int(word) for word in file.read().split()]


if __name__ == "__main__":
    sys.exit(main())
