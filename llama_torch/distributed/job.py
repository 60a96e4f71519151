"""Join torchrun's other processes, and share what the main one reads."""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from llama_common.errors import InputError

from ..common.torchrun import is_launched

T = TypeVar("T")

# Messages of gloo and sockets when a peer is gone; they have no exception class for it.
LOST = r"(?i)(closed|reset) by peer|connection (closed|reset|refused)|broken pipe|timed out"

TIMEOUT = timedelta(days=1)  # rank 0 may tokenise for long; a dead peer is noticed at once


class PeerLostError(Exception):
    """Another process of this job ended."""


@contextmanager
def job() -> Iterator[None]:
    """Join torchrun's other processes.

    Host-side messages go through gloo, so that no GPU is waited for, and CUDA tensors through
    NCCL. Raises PeerLostError when another process ends while this one waits for it. The process
    must end with ``torchrun.exit_process``.
    """
    if not is_launched():
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    try:
        store, rank, world = next(dist.rendezvous("env://"))
        # torchrun's store outlives an attempt, and may still name where its processes listened.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = dist.PrefixStore(f"attempt {attempt}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=TIMEOUT)
        yield
    except (RuntimeError, ConnectionError) as error:
        # A broken pipe that is an OSError is the reader of the output who went away.
        if isinstance(error, BrokenPipeError):
            raise
        if not (isinstance(error, dist.DistError) or re.search(LOST, str(error))):
            raise
        raise PeerLostError(str(error).strip().splitlines()[0]) from None


def broadcast_object(make: Callable[[], T]) -> T:
    """Call ``make`` on the main process and broadcast the picklable object it returns.

    An InputError, OSError or SystemExit raised there ends the other processes silently, with
    the same exit code.
    """
    if not dist.is_initialized():
        return make()
    message: list[Any] = [None, None]
    failure: BaseException | None = None
    if dist.get_rank() == 0:
        try:
            message[0] = make()
        except (InputError, OSError, SystemExit) as error:
            failure, message[1] = error, (error.code or 0) if isinstance(error, SystemExit) else 2
    dist.broadcast_object_list(message, 0, device=torch.device("cpu"))
    if failure is not None:
        raise failure
    if message[1] is not None:
        raise SystemExit(message[1])
    made: T = message[0]
    return made
