"""Join torchrun's other processes, and end together with them."""

import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist

from ..common.errors import InputError
from ..common.torchrun import is_launched

T = TypeVar("T")

# What gloo and sockets say when the other end is gone; they have no exception of their own for it.
LOST = r"(?i)(closed|reset) by peer|connection (closed|reset|refused)|broken pipe|timed out"

TIMEOUT = timedelta(days=1)  # the others wait while the first tokenises; a dead peer shows at once


class PeerLostError(Exception):
    """Another process of this job ended."""


@contextmanager
def job() -> Iterator[None]:
    """Join torchrun's other processes.

    gloo carries what the hosts tell each other, so that no GPU is waited for; NCCL the tensors.
    Raises PeerLostError when another process ends while this one waits for it. The process is to
    end with ``leave``.
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


def leave(main: Callable[[], int]) -> NoReturn:
    """Call ``main`` and end this process with what it returns.

    In a job without what torch and Python do at their end: threads there may abort the process,
    and the end of a group waits for those who are gone.
    """
    if not is_launched():
        sys.exit(main())
    code: Any = 1
    try:
        code = main()
    except SystemExit as error:
        code = error.code or 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 1)


def first_says(make: Callable[[], T]) -> T:
    """Return on every process of the job what ``make`` returns on the first.

    What is raised there ends the others without a word of their own.
    """
    if not dist.is_initialized():
        return make()
    said: list[Any] = [None, None]
    failure: BaseException | None = None
    if dist.get_rank() == 0:
        try:
            said[0] = make()
        except (InputError, OSError, SystemExit) as error:
            failure, said[1] = error, (error.code or 0) if isinstance(error, SystemExit) else 2
    dist.broadcast_object_list(said, 0, device=torch.device("cpu"))
    if failure is not None:
        raise failure
    if said[1] is not None:
        raise SystemExit(said[1])
    made: T = said[0]
    return made
