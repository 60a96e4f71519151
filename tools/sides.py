"""The other side of a comparison, whatever it is, as a trace of the same calls."""

import dataclasses
import importlib.util
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn

from llama_torch.config import ModelConfig
from llama_torch.device import pick_device
from llama_torch.model import Llama
from parity_tests import backends
from reference_np.checkpoint import Checkpoint
from reference_np.config import InputError, LlamaConfig
from reference_np.naming import LM_HEAD, activation_axes, parameter_shapes
from reference_np.ops import Array

from .traces import FORMAT, Call, Trace, TraceWriter, write_trace

DTYPES = ("float64", "float32", "bfloat16", "float16")
STREAMED = ("torch", "cuda", "hf")
Advance = Callable[[], None]


class Side(NamedTuple):
    """What the checkpoint is compared with, ready to be run."""

    title: str
    dtype: str
    # Writes every call's activations; returns for each call what it covers: "activations",
    # "logits", or the reason why nothing.
    record: Callable[[TraceWriter, Sequence[Call], LlamaConfig, Advance], list[str]] | None
    trace: Trace | None = None  # already recorded
    backend: Any = None  # for training
    weights: Path | None = None  # other ones than the oracle's


class Recording(NamedTuple):
    """The other side's activations, and what of every call they cover."""

    trace: Trace
    coverage: list[str]


def find_side(spec: str, dtype: str, checkpoint: Checkpoint) -> Side:
    """Understand ``--against``; ``dtype`` may be empty. Raises InputError for what is neither."""
    kind, _, suffix = spec.partition(":")
    if kind in STREAMED and suffix in ("", *DTYPES):
        if suffix and dtype not in ("", suffix):
            raise InputError(f"--against {spec} and --dtype {dtype} disagree; drop one")
        return _streamed(kind, suffix or dtype or "float32", checkpoint, spec)
    path = Path(spec)
    if path.exists():
        if path.is_file() and _is_trace(path):
            trace = Trace(path)
            _require_same(trace.config, checkpoint, spec)
            if dtype not in ("", trace.dtype):
                raise InputError(f"--dtype {dtype}: {spec} was computed in {trace.dtype}; drop it")
            return Side(f"the trace {spec}", trace.dtype, None, trace)
        other = Checkpoint(path)
        _require_same(other.config, checkpoint, spec)
        side = _streamed("torch", dtype or "float32", other, spec)
        return side._replace(title=f"torch with the weights of {spec}", weights=path)
    if spec in backends.SHIPPED or ":" in spec:
        return _backend(spec, dtype, checkpoint)
    raise InputError(
        f"--against {spec}: no such file; give a checkpoint, a trace, package.module:object, or "
        f"one of {', '.join([*STREAMED, *backends.SHIPPED])}"
    )


def record(
    side: Side, calls: Sequence[Call], config: LlamaConfig, folder: Path, advance: Advance
) -> Recording:
    """Run the other side on every call, with ``config.n_layers`` layers."""
    if side.record is None:
        assert side.trace is not None
        return Recording(side.trace, ["activations"] * len(calls))
    coverage: list[str] = []
    path = folder / "recording.safetensors"
    write = side.record
    write_trace(
        path,
        config,
        calls,
        side.dtype,
        lambda writer: coverage.extend(write(writer, calls, config, advance)),
    )
    return Recording(Trace(path), coverage)


def _is_trace(path: Path) -> bool:
    try:
        with safe_open(path, framework="np") as file:
            return (file.metadata() or {}).get("format") == FORMAT
    except Exception:  # whatever is wrong with it, the checkpoint's reader will say
        return False


def _require_same(config: LlamaConfig, checkpoint: Checkpoint, spec: str) -> None:
    if config != checkpoint.config:
        ours, theirs = (dataclasses.asdict(c) for c in (checkpoint.config, config))
        wrong = [f"{k} {theirs[k]} for {ours[k]}" for k in ours if ours[k] != theirs[k]]
        raise InputError(
            f"--against {spec}: another architecture than {checkpoint.path} ({', '.join(wrong)}); "
            "give one of the same config"
        )


# Torch modules, ours and Hugging Face's: both carry Hugging Face's names.


def stream_weights(
    model: nn.Module, read: Callable[[str], Tensor], keep: Sequence[str] = ()
) -> None:
    """Let every module of a meta model read its own parameters for the time it runs."""
    for path, module in model.named_modules():
        names = [name for name, _ in module.named_parameters(recurse=False)]
        if not names:
            continue

        def load(module: nn.Module, _: Any, path: str = path, names: Sequence[str] = names) -> None:
            for name in names:
                value = read(f"{path}.{name}")
                module._parameters[name] = nn.Parameter(value, requires_grad=False)

        def drop(module: nn.Module, *_: Any, names: Sequence[str] = names) -> None:
            for name in names:
                value = module.get_parameter(name).to("meta")
                module._parameters[name] = nn.Parameter(value, requires_grad=False)

        if path in keep:
            load(module, None)
        else:
            module.register_forward_pre_hook(load)
            module.register_forward_hook(drop)


def _reader(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> Any:
    tied = checkpoint.config.tie_embeddings

    def read(name: str) -> Tensor:
        if tied and name == LM_HEAD:
            name = "model.embed_tokens.weight"
        with safe_open(checkpoint.file_of(name), framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor.to(device, dtype, copy=True)  # the file's memory map must not live on

    return read


def _streamed(kind: str, dtype: str, checkpoint: Checkpoint, spec: str) -> Side:
    device = pick_device("cuda" if kind == "cuda" else "cpu")
    read = _reader(checkpoint, getattr(torch, dtype), device)
    hugging_face = kind == "hf"
    if hugging_face and importlib.util.find_spec("transformers") is None:
        raise InputError(f"--against {spec}: needs transformers; pip install transformers")

    def write(
        writer: TraceWriter, calls: Sequence[Call], config: LlamaConfig, advance: Advance
    ) -> list[str]:
        make = _hugging_face if hugging_face else _ours
        try:
            forward, context = make(config, read, getattr(torch, dtype), device)
        except NotImplementedError as error:
            raise InputError(f"--against {spec}: cannot run this config: {error}") from None
        index = 0

        def note(name: str, value: Tensor) -> None:
            wide = value if value.dtype == torch.float64 else value.float()
            writer.add(index, name, wide.cpu().numpy())
            if name.endswith(".residual"):
                advance()

        caches: list[Any] = []
        with torch.inference_mode(), context:
            for index, call in enumerate(calls):  # noqa: B007  (note reads it)
                cache = None if call.after is None else caches[call.after]
                caches.append(forward(call, cache, note))
        return ["activations"] * len(calls)

    title = {"torch": "torch", "cuda": "torch on the GPU", "hf": "transformers"}[kind]
    shipped = {"torch": "torch", "cuda": "cuda", "hf": "transformers"}[kind]
    return Side(f"{title}, the same weights", dtype, write, backend=shipped)


Forward = Callable[..., Any]
Note = Callable[[str, Tensor], None]


def _ours(
    config: LlamaConfig, read: Any, dtype: torch.dtype, device: torch.device
) -> tuple[Forward, AbstractContextManager[Any]]:
    with torch.device("meta"):
        model = Llama(ModelConfig(**dataclasses.asdict(config))).eval()
    # A tied embedding serves as the head too, after its own module has run.
    stream_weights(model, read, ["model.embed_tokens"] if config.tie_embeddings else [])

    def forward(call: Call, cache: Any, note: Note) -> Any:
        tokens, positions, mask = (
            None if x is None else torch.from_numpy(np.array(x)).to(device)
            for x in (call.tokens, call.positions, call.mask)
        )
        return model(tokens, positions=positions, mask=mask, cache=cache, trace=note)[1]

    return forward, nullcontext()


def _hugging_face(
    config: LlamaConfig, read: Any, dtype: torch.dtype, device: torch.device
) -> tuple[Forward, AbstractContextManager[Any]]:
    from parity_tests.backends import transformers_backend as hf

    model = hf.empty_model(config, dtype)
    stream_weights(model, read)

    def forward(call: Call, cache: Any, note: Note) -> Any:
        with hf.tracing(model, note):
            return hf.call(model, call.tokens, call.positions, call.mask, cache)[1]

    return forward, nullcontext()


# Anything behind the suite's protocol.


class _Params(Mapping[str, Array]):
    """The parameters of the first layers, in the precision under test, read when asked for."""

    def __init__(self, checkpoint: Checkpoint, config: LlamaConfig, dtype: str) -> None:
        self.checkpoint, self.names = checkpoint, list(parameter_shapes(config))
        self.dtype = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)

    def __getitem__(self, name: str) -> Array:
        if name not in self.names:
            raise KeyError(name)
        return self.checkpoint[name].astype(self.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def _backend(spec: str, dtype: str, checkpoint: Checkpoint) -> Side:
    backend = backends.load(spec, "--against")
    known = tuple(getattr(backend, "dtypes", backends.Backend.dtypes))
    dtype = dtype or ("float32" if "float32" in known else known[0])
    if dtype not in known:
        raise InputError(
            f"--dtype {dtype}: {spec} computes in {', '.join(known)}; give one of them"
        )

    def write(
        writer: TraceWriter, calls: Sequence[Call], config: LlamaConfig, advance: Advance
    ) -> list[str]:
        params = _Params(checkpoint, config, dtype)
        caches: list[Any] = []
        coverage: list[str] = []
        for index, call in enumerate(calls):
            cache = None if call.after is None else caches[call.after]
            found, cache, covers = _ask(backend, config, params, call, cache, calls)
            caches.append(cache)
            coverage.append(covers)
            for name in activation_axes(config):
                if name in found:
                    writer.add(index, name, _wide(found[name]))
            for _ in range(config.n_layers):
                advance()
        return coverage

    return Side(spec, dtype, write, backend=spec)


def _ask(
    backend: Any,
    config: LlamaConfig,
    params: Mapping[str, Array],
    call: Call,
    cache: Any,
    calls: Sequence[Call],
) -> tuple[Mapping[str, Array], Any, str]:
    """Get as much of one call as the backend offers: activations, cache, what that covers.

    Raises InputError for an exception of the backend's own, with the place where it arose.
    """
    given = (config, params, call.tokens, call.positions, call.mask)
    why = "not offered"

    def ask(name: str, *arguments: Any) -> Any:
        nonlocal why
        method = getattr(backend, name, None)
        if method is None:
            return None
        try:
            return method(*arguments)
        except NotImplementedError as error:
            why = str(error) or why
            return None
        except Exception as error:
            at = traceback.extract_tb(error.__traceback__)[-1]
            raise InputError(
                f"--against: {name} failed on the call {call.name!r}: {type(error).__name__}: "
                f"{error} ({at.filename}:{at.lineno}); mend it or raise NotImplementedError"
            ) from error

    if call.after is not None and cache is None:
        return {}, None, "decoding is not offered"
    if both := ask("traced_decode", *given, cache):
        return *both, "activations"
    decoded = ask("decode", *given, cache)
    logits, cache = decoded if decoded else (None, None)
    if call.after is None:
        if found := ask("trace", *given):
            return found, cache, "activations"
        if logits is None:
            logits = ask("logits", *given)
    return ({}, cache, why) if logits is None else ({"logits": logits}, cache, "logits")


def _wide(value: Any) -> Array:
    array = np.asarray(value)
    return array if array.dtype == np.float64 else array.astype(np.float32)
