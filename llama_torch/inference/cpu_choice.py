"""Choose the quickest way of a work on this CPU by timing each, and keep the answer for a week.

Which way is quickest differs between processors: on one NumPy reads a matrix twice as fast as
torch, on another half as fast. So a small model, larger than most caches, takes a few steps by each
way; that takes some tenths of a second. The answer is kept in the user's cache folder under the
processor, the libraries' versions, the dtype and the number of threads. Other work of the machine
may have decided it: where the times scattered it is kept for an hour, else for a week. A file that
does not hold such an answer is written again; where none can be written, each process measures for
itself.
"""

import functools
import hashlib
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import cast

import torch

from llama_common.errors import InputError

from ..common.processor import libraries, processor
from ..common.state_file import read_state, write_state
from ..common.user_cache import user_cache
from ..model.config import ModelConfig
from ..model.cpu_linear import Products, onednn_products
from ..model.kv_cache import StaticCache
from ..model.llama import Llama, linear_products
from .config import Decoding
from .eager_step import EagerStep
from .native_step import NativeStep
from .numpy_step import NumpyStep

# In float32 100 MB, of which a token reads all.
SHAPE = ModelConfig(576, 4, 9, 3, 64, 1536, 16384, 256)
PROMPT = 128  # tokens
ROWS = (1, 8, 32)  # numbers of rows that are timed; others are taken for the next of them
TURNS, CALLS = 2, 2  # of whose calls the quickest counts: other work only slows one down
SCATTER = 1.25  # times the quickest, beyond which the median tells of such work
HOUR, WEEK = 3600, 7 * 24 * 3600  # seconds

Way = Callable[[], object]


def decoding_mode(model: Llama, rows: int) -> Decoding:
    """Return the quickest mode of decoding ``rows`` rows of a model on this CPU."""
    timed_rows = next((n for n in ROWS if rows <= n), None)
    if timed_rows is None:
        return "eager"
    modes = ["eager"]
    if rows == 1 and NumpyStep.supports(model):
        modes.append("numpy")
    if NativeStep.supports(model, rows):
        modes.append("native")
    dtype, threads = model.model.embed_tokens.weight.dtype, torch.get_num_threads()
    return cast(Decoding, _quickest(f"decode {timed_rows}", tuple(modes), dtype, threads))


def prompt_products(model: Llama, decoding: Decoding = "auto") -> Products:
    """Return the quickest matrix products of several tokens.

    On a GPU and for the mode "eager" they are the layers' own.
    """
    weight = model.model.embed_tokens.weight
    if decoding == "eager" or weight.device.type != "cpu" or weight.dtype != torch.float32:
        return linear_products
    names = ("torch", "onednn") if torch.backends.mkldnn.is_available() else ("torch",)
    chosen = _quickest("prompt", names, weight.dtype, torch.get_num_threads())
    return onednn_products if chosen == "onednn" else linear_products


@functools.cache
def _quickest(work: str, names: tuple[str, ...], dtype: torch.dtype, threads: int) -> str:
    """Return the quickest of the ways ``names``: as it was found before, or timed now."""
    if len(names) == 1:
        return names[0]
    key = f"{work}, {', '.join(names)}; {dtype}, {threads} threads; {libraries()}; {processor()}"
    name = hashlib.sha256(key.encode()).hexdigest()[:24]
    file = f"{name}.json"
    try:
        found = read_state(_folder() / file, "it is written again")[0]
        if found.get("key") == key and found.get("quickest") in names and _is_fresh(found):
            return str(found["quickest"])
    except (OSError, InputError):
        pass  # none yet, or not one of ours
    times = time_ways(_ways(work, dtype, names))
    quickest = min(times, key=lambda name: min(times[name]), default=names[0])
    is_quiet = all(statistics.median(each) <= SCATTER * min(each) for each in times.values())
    answer = {"key": key, "quickest": quickest, "timed": time.time(), "is_quiet": is_quiet}
    try:
        _folder().mkdir(parents=True, exist_ok=True)
        write_state(_folder() / file, answer | {"seconds": times}, indent=1)
    except (OSError, InputError):
        pass
    return quickest


def _folder() -> Path:
    return user_cache() / "quickest"


def _is_fresh(answer: Mapping[str, object]) -> bool:
    """Return whether an answer still counts; none does that was given in the future."""
    timed, limit = answer.get("timed"), WEEK if answer.get("is_quiet") is True else HOUR
    return isinstance(timed, float) and 0 <= time.time() - timed < limit


@torch.inference_mode()
def time_ways(ways: Mapping[str, Way]) -> dict[str, list[float]]:
    """Return the seconds of each call of each way; ways that fail are left out.

    They take turns, so that a while of other work on the machine falls on all of them.
    """
    times: dict[str, list[float]] = {}
    for name, way in ways.items():
        try:
            way()  # allocates, and starts threads
            times[name] = []
        except (AttributeError, RuntimeError):  # an operation that this torch does not have
            continue
    for _ in range(TURNS):
        for name, each in times.items():
            each += (_seconds(ways[name]) for _ in range(CALLS))
    return times


def _seconds(way: Way) -> float:
    start = time.perf_counter()
    way()
    return time.perf_counter() - start


def _ways(work: str, dtype: torch.dtype, names: tuple[str, ...]) -> dict[str, Way]:
    """Return a call of each way on a model of SHAPE: a token of each row, or a prompt."""
    model = _model(dtype)
    if work == "prompt":
        tokens_BT = torch.zeros(1, PROMPT, dtype=torch.int64)
        products = {"torch": linear_products, "onednn": onednn_products}

        def prefill(name: str) -> object:
            step = EagerStep(model, _cache(model, 1), products[name])
            return step.prefill(tokens_BT, PROMPT)

        return {name: functools.partial(prefill, name) for name in names}
    rows = int(work.removeprefix("decode "))
    tokens_B = torch.zeros(rows, dtype=torch.int64)
    steps: Mapping[str, Callable[[StaticCache], EagerStep | NumpyStep | NativeStep]] = {
        "eager": lambda cache: EagerStep(model, cache, prompt_products(model)),
        "numpy": lambda cache: NumpyStep(model, cache),
        "native": lambda cache: NativeStep(model, cache),
    }
    made = {name: steps[name](_cache(model, rows)) for name in names}
    for step in made.values():
        step.begin([0] * rows)
    return {name: functools.partial(step.decode, tokens_B) for name, step in made.items()}


def _model(dtype: torch.dtype) -> Llama:
    """Return a model of SHAPE; of zeros the system would have only one page of memory."""
    with torch.device("meta"):
        model = Llama(SHAPE).to(dtype)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for weight in model.parameters():
            weight.fill_(0.01)
    return model


def _cache(model: Llama, rows: int) -> StaticCache:
    return StaticCache(SHAPE, rows, SHAPE.max_seq_len, model.model.embed_tokens.weight.dtype)
