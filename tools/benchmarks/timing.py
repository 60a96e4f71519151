"""Timing several sides in turn, and what comes of it: the core of bench.py."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

READS = 10  # matrix-vector products in one timing of the memory


class Setup(NamedTuple):
    """What every work is measured with."""

    shape: str
    dtype: str
    device: torch.device
    repeats: int
    batch_size: int
    new_tokens: int
    compiled_peer: bool

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype itself."""
        found: torch.dtype = getattr(torch, self.dtype)
        return found


class Row(NamedTuple):
    """One line of the table; speeds in tokens/s."""

    work: str
    shape: str
    dtype: str
    ours: float
    peer: str
    peer_speed: float | None  # None: not installed
    ratio: float | None
    limit: float | None  # ours as a fraction of the limit; None: none was measured


class Side(NamedTuple):
    """A call to be timed, and how much it does: tokens, or bytes."""

    call: Callable[[], Any]
    amount: float


# By name, in the table's order: "ours", its peers (None: not installed), "(a limit)" in brackets.
Sides = dict[str, Side | None]
Speeds = Mapping[str, Sequence[float]]
Same = Callable[[Any, Any], None]  # raises where ours and a peer's computed different things


def alternate(sides: Sides, setup: Setup, same: Same | None = None) -> dict[str, list[float]]:
    """Time all in turn, after one uncounted call of each; return amounts per second.

    The uncounted calls' results are compared: speed says nothing of sides that compute
    different things. In less than float32 they may round apart.
    """
    here = {name: side for name, side in sides.items() if side}
    results = {name: side.call() for name, side in here.items()}
    if same is not None and setup.dtype == "float32":
        for name in here:
            if not name.startswith(("ours", "(")):
                same(results["ours"], results[name])
    del results
    speeds: dict[str, list[float]] = {name: [] for name in here}
    for _ in range(setup.repeats):
        for name, side in here.items():
            synchronize(setup.device)
            start = time.perf_counter()
            side.call()
            synchronize(setup.device)
            speeds[name].append(side.amount / (time.perf_counter() - start))
    return speeds


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def paired(ours: Sequence[float], others: Sequence[float]) -> float:
    """Return the median ratio of neighbours: fair on a machine whose speed drifts."""
    return statistics.median(a / b for a, b in zip(ours, others, strict=True))


def rows(
    work: str, shape: str, dtype: str, sides: Sides, speeds: Speeds, limit: float | None = None
) -> list[Row]:
    """Return a row for each peer."""
    ours = speeds["ours"]
    made = []
    for peer in sides:
        if peer == "ours" or peer.startswith("("):
            continue
        theirs = speeds.get(peer)
        speed = None if theirs is None else statistics.median(theirs)
        ratio = None if theirs is None else paired(ours, theirs)
        made.append(Row(work, shape, dtype, statistics.median(ours), peer, speed, ratio, limit))
    return made


def same_tokens(ours: list[int], peer: list[int]) -> None:
    """Raise RuntimeError unless both decoded the same."""
    if ours != peer:
        raise RuntimeError("the two sides decode different tokens; their speed says nothing")


def same_numbers(ours: Any, peer: Any) -> None:
    """Raise RuntimeError beyond what llama.cpp's half-precision attention rounds away.

    Of logits, or a loss.
    """
    ours, peer = torch.as_tensor(ours), torch.as_tensor(peer)
    error = (ours - peer).abs().max() / peer.abs().max()
    if not error <= 1e-3:
        raise RuntimeError(f"the two sides' results differ by {error:.1e} of the largest")


def memory_sides(device: torch.device) -> Sides:
    """Return plain matrix-vector products; the fastest of them is what the memory gives."""
    on_cuda = device.type == "cuda"
    size, dtype = ((65536, 16384), torch.bfloat16) if on_cuda else ((49152, 576), torch.float32)
    matrix = torch.ones(size, dtype=dtype, device=device)
    vector = torch.ones(size[1], dtype=dtype, device=device)
    amount = READS * matrix.nbytes
    sides: Sides = {"(torch.mv)": Side(lambda: repeat(torch.mv, matrix, vector), amount)}
    if not on_cuda:
        operands = matrix.numpy(), vector.numpy()
        sides["(numpy)"] = Side(lambda: repeat(np.matmul, *operands), amount)
    return sides


def repeat(product: Callable[[Any, Any], object], matrix: Any, vector: Any) -> None:
    """Multiply often enough to be timed."""
    for _ in range(READS):
        product(matrix, vector)
