"""Time the calls of several sides alternately, and compute their speeds and ratios."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

READS = 10  # matrix-vector products in one timing of the memory
# Seconds after a turn: NumPy's threads, which read the memory last, go on spinning for a while,
# and took half of the speed from the side that came next.
SETTLE = 0.3


class Setup(NamedTuple):
    """The settings of a benchmark, the same for every work."""

    shape: str
    dtype: str
    device: torch.device
    repeats: int
    batch_size: int
    new_tokens: int
    compiled_peer: bool
    precision: str = "dtype"
    moments: str = "float32"
    ours_alone: bool = False

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch has it."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype


class SpeedRow(NamedTuple):
    """One row of the table of all works but training; speeds in tokens/s."""

    work: str
    shape: str
    dtype: str
    ours: float
    peer: str
    peer_speed: float | None  # None: not installed
    ratio: float | None
    limit: float | None  # ours as a fraction of the limit; None: none was measured


class TimedCall(NamedTuple):
    """A function to time, and the amount of one call: tokens, or bytes."""

    call: Callable[[], Any]
    amount: float


# By name, in the table's order: "ours", peers (None: not installed), and limits, "(in brackets)".
TimedCalls = dict[str, TimedCall | None]
Speeds = Mapping[str, Sequence[float]]
AssertSame = Callable[[Any, Any], None]  # (our result, a peer's): raises where they differ


def time_alternately(
    sides: TimedCalls, setup: Setup, same: AssertSame | None = None
) -> dict[str, list[float]]:
    """Time all sides in turn, ``setup.repeats`` times; return amounts per second by name.

    Each side is called once before, untimed, and its result compared by ``same``: the speeds of
    sides that compute different things say nothing. Not so below float32, where they round apart.
    """
    installed = {name: side for name, side in sides.items() if side}
    results = {name: side.call() for name, side in installed.items()}
    if same is not None and setup.dtype == "float32":
        for name in installed:
            if not name.startswith(("ours", "(")):
                same(results["ours"], results[name])
    del results
    speeds: dict[str, list[float]] = {name: [] for name in installed}
    for _ in range(setup.repeats):
        for name, side in installed.items():
            synchronize(setup.device)
            start = time.perf_counter()
            side.call()
            synchronize(setup.device)
            speeds[name].append(side.amount / (time.perf_counter() - start))
        if setup.device.type == "cpu":
            time.sleep(SETTLE)
    return speeds


def synchronize(device: torch.device) -> None:
    """Wait until the device has run all queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def median_ratio(ours: Sequence[float], others: Sequence[float]) -> float:
    """Return the median of ratios within a turn, in which a drift of the machine cancels."""
    return statistics.median(a / b for a, b in zip(ours, others, strict=True))


def speed_rows(
    work: str, shape: str, dtype: str, sides: TimedCalls, speeds: Speeds, limit: float | None = None
) -> list[SpeedRow]:
    """Return a row for each peer; ``limit``: our speed as a fraction of the limit."""
    ours = speeds["ours"]
    rows = []
    for peer in sides:
        if peer == "ours" or peer.startswith("("):
            continue
        theirs = speeds.get(peer)
        speed = None if theirs is None else statistics.median(theirs)
        ratio = None if theirs is None else median_ratio(ours, theirs)
        rows.append(
            SpeedRow(work, shape, dtype, statistics.median(ours), peer, speed, ratio, limit)
        )
    return rows


def same_tokens(ours: list[int], peer: list[int]) -> None:
    """Raise RuntimeError unless both sides decoded the same token ids."""
    if ours != peer:
        raise RuntimeError("the two sides decode different tokens; their speed says nothing")


def same_numbers(ours: Any, peer: Any) -> None:
    """Raise RuntimeError where logits, or a loss, differ by over 1e-3 of the largest.

    llama.cpp's half-precision attention rounds that much.
    """
    ours, peer = torch.as_tensor(ours), torch.as_tensor(peer)
    error = (ours - peer).abs().max() / peer.abs().max()
    if not error <= 1e-3:
        raise RuntimeError(f"the two sides' results differ by {error:.1e} of the largest")


def memory_reads(device: torch.device) -> TimedCalls:
    """Return matrix-vector products; the fastest measures the memory's bytes per second."""
    on_cuda = device.type == "cuda"
    size, dtype = ((65536, 16384), torch.bfloat16) if on_cuda else ((49152, 576), torch.float32)
    matrix = torch.ones(size, dtype=dtype, device=device)
    vector = torch.ones(size[1], dtype=dtype, device=device)
    amount = READS * matrix.nbytes
    sides: TimedCalls = {"(torch.mv)": TimedCall(lambda: repeat(torch.mv, matrix, vector), amount)}
    if not on_cuda:
        operands = matrix.numpy(), vector.numpy()
        # matmul has threads of its own, whatever torch's number is; vecdot has one.
        product = np.vecdot if torch.get_num_threads() == 1 else np.matmul
        sides["(numpy)"] = TimedCall(lambda: repeat(product, *operands), amount)
    return sides


def repeat(product: Callable[[Any, Any], object], matrix: Any, vector: Any) -> None:
    """Multiply ``READS`` times, long enough to time."""
    for _ in range(READS):
        product(matrix, vector)
