"""The other side of a comparison, whatever it is, as a trace of the same calls."""

import dataclasses
import importlib.util
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn

from llama_torch.checkpoint.hf import locate, read_tensor, weight_files
from llama_torch.common.files import parse_json, read_json
from llama_torch.model.config import ModelConfig
from llama_torch.model.llama import Llama
from reference_np import backend as backends
from reference_np.checkpoint import Checkpoint
from reference_np.config import InputError, LlamaConfig
from reference_np.naming import EMBED, LM_HEAD, activation_axes, parameter_shapes
from reference_np.ops import Array
from tools.traces import FORMAT, Call, Trace, TraceWriter, write_trace

DTYPES = ("float64", "float32", "bfloat16", "float16")
STREAMED = ("torch", "cuda", "hf")
Advance = Callable[[], None]


class Side(NamedTuple):
    """What the checkpoint is compared with, ready to be run."""

    title: str
    dtype: str
    # Writes every call's activations; returns for each call what it covers: "activations",
    # "logits", or "not covered: " and why.
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
        return _streamed(kind, suffix or dtype or "float32", checkpoint.path, spec)
    path = Path(spec)
    if spec and path.exists():
        if path.is_file() and _is_trace(path):
            trace = Trace(path)
            _require_same(trace.config, checkpoint, spec)
            if dtype not in ("", trace.dtype):
                raise InputError(f"--dtype {dtype}: {spec} was computed in {trace.dtype}; drop it")
            return Side(f"the trace {spec}", trace.dtype, None, trace)
        _require_same(Checkpoint(path).config, checkpoint, spec)
        side = _streamed("torch", dtype or "float32", path, spec)
        return side._replace(title=f"torch with the weights of {spec}", weights=path)
    if spec in backends.SHIPPED or ":" in spec:
        return _backend(spec, dtype, checkpoint)
    raise InputError(
        f"--against {spec}: no such file; give a checkpoint, a trace, package.module:object, or "
        f"one of {', '.join(dict.fromkeys([*STREAMED, *backends.SHIPPED]))}"
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


def _streamed(kind: str, dtype: str, path: Path, spec: str) -> Side:
    """Run torch or transformers; each reads config and files by its own means."""
    if kind == "cuda" and not torch.cuda.is_available():
        raise InputError(f"--against {spec}: torch sees no CUDA device here; use torch instead")
    device = torch.device("cuda" if kind == "cuda" else "cpu")
    torch_dtype = getattr(torch, dtype)
    if kind == "hf" and importlib.util.find_spec("transformers") is None:
        raise InputError(f"--against {spec}: needs transformers; pip install transformers")
    own, files = locate(path)

    def read(name: str) -> Tensor:
        if own.tie_embeddings and name == LM_HEAD:
            name = EMBED
        return read_tensor(files[name][0], name, torch_dtype, device)

    def write(
        writer: TraceWriter, calls: Sequence[Call], config: LlamaConfig, advance: Advance
    ) -> list[str]:
        if kind == "hf":
            forward = _hugging_face(path, config.n_layers, read, torch_dtype, spec)
        else:
            forward = _ours(dataclasses.replace(own, n_layers=config.n_layers), read, device)
        index = 0

        def note(name: str, value: Tensor) -> None:
            wide = value if value.dtype == torch.float64 else value.float()
            writer.add(index, name, wide.cpu().numpy())
            if name.endswith(".residual"):
                advance()

        caches: list[Any] = []
        with torch.inference_mode():
            for index, call in enumerate(calls):  # noqa: B007  (note reads it)
                cache = None if call.after is None else caches[call.after]
                caches.append(forward(call, cache, note))
        return ["activations"] * len(calls)

    title, shipped = {
        "torch": ("torch", "torch"),
        "cuda": ("torch on the GPU", "cuda"),
        "hf": ("transformers", "transformers"),
    }[kind]
    return Side(f"{title}, the same weights", dtype, write, backend=shipped)


Forward = Callable[[Call, Any, Callable[[str, Tensor], None]], Any]


def _ours(config: ModelConfig, read: Callable[[str], Tensor], device: torch.device) -> Forward:
    with torch.device("meta"):
        model = Llama(config).eval()
    # A tied embedding serves as the head too, after its own module has run.
    stream_weights(model, read, ["model.embed_tokens"] if config.tie_embeddings else [])

    def forward(call: Call, cache: Any, note: Callable[[str, Tensor], None]) -> Any:
        tokens, positions, mask = (
            None if x is None else torch.from_numpy(np.array(x)).to(device)
            for x in (call.tokens, call.positions, call.mask)
        )
        return model(tokens, positions=positions, mask=mask, cache=cache, trace=note)[1]

    return forward


def _hugging_face(
    path: Path, n_layers: int, read: Callable[[str], Tensor], dtype: torch.dtype, spec: str
) -> Forward:
    from parity_tests.backends import transformers_backend as hf

    try:
        model = hf.empty_model(hf.config_from(_raw_config(path), n_layers), dtype)
    except NotImplementedError as error:
        raise InputError(f"--against {spec}: cannot run this config: {error}") from None
    stream_weights(model, read)

    def forward(call: Call, cache: Any, note: Callable[[str, Tensor], None]) -> Any:
        with hf.tracing(model, note):
            return hf.call(model, call.tokens, call.positions, call.mask, cache)[1]

    return forward


def _raw_config(path: Path) -> dict[str, Any]:
    """Return config.json as it is written, from beside the weights or from inside them."""
    beside = (path if path.is_dir() else path.parent) / "config.json"
    if beside.is_file():
        return read_json(beside)
    with safe_open(weight_files(path)[0], framework="pt") as file:
        return parse_json(file.metadata()["config"], str(path))


# Anything behind the suite's protocol.


class Parameters(Mapping[str, Array]):
    """The parameters of the first layers, in the precision under test, read when asked for.

    Every time anew: what somebody does to one reaches nobody else.
    """

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
    known = backends.dtypes_of(backend)
    dtype = dtype or ("float32" if "float32" in known else known[0])
    if dtype not in known:
        raise InputError(
            f"--dtype {dtype}: {spec} computes in {', '.join(known)}; give one of them"
        )

    def write(
        writer: TraceWriter, calls: Sequence[Call], config: LlamaConfig, advance: Advance
    ) -> list[str]:
        params = Parameters(checkpoint, config, dtype)
        caches: list[Any] = []
        coverage: list[str] = []
        for index, call in enumerate(calls):
            cache = None if call.after is None else caches[call.after]
            found, cache, covers = _ask(backend, config, params, call, cache)
            caches.append(cache)
            coverage.append(covers)
            for name in activation_axes(config):
                if name in found:
                    writer.add(index, name, found[name])
            for _ in range(config.n_layers):
                advance()
        return coverage

    return Side(spec, dtype, write, backend=spec)


def ask(backend: Any, name: str, what: str, *arguments: Any) -> Any:
    """Call a method of a backend; its own exceptions become one line with their place.

    Raises NotImplementedError where the method is missing or says so.
    """
    method = getattr(backend, name, None)
    if not callable(method):
        raise NotImplementedError(f"{name} is not offered")
    try:
        return method(*arguments)
    except NotImplementedError as error:
        raise NotImplementedError(str(error) or f"{name} is not offered") from None
    except (Exception, SystemExit) as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())
        at = traceback.extract_tb(error.__traceback__)[-1]
        raise InputError(
            f"--against: {name} failed on {what}: {why} "
            f"({at.filename}:{at.lineno}); mend it or raise NotImplementedError"
        ) from error


def _ask(
    backend: Any, config: LlamaConfig, params: Mapping[str, Array], call: Call, cache: Any
) -> tuple[dict[str, Array], Any, str]:
    """Get as much of one call as the backend offers: activations, cache, what that covers."""
    # Copies: what a backend does to its inputs must not reach the oracle.
    inputs = (None if x is None else x.copy() for x in (call.tokens, call.positions, call.mask))
    given = (config, params, *inputs)
    what = f"the call {call.name!r}"
    if call.after is not None and cache is None:
        return {}, None, "not covered: decoding is not offered"
    try:
        found, cache = _pair(ask(backend, "traced_decode", what, *given, cache), "traced_decode")
        return _arrays(found, "traced_decode"), cache, "activations"
    except NotImplementedError:
        pass
    logits: dict[str, Array] = {}
    try:
        decoded, cache = _pair(ask(backend, "decode", what, *given, cache), "decode")
        logits = _arrays({"logits": decoded}, "decode")
    except NotImplementedError as error:
        why, cache = str(error), None
    if call.after is None:
        try:
            # What people run is decode: its logits are the ones to judge.
            found = _arrays(ask(backend, "trace", what, *given), "trace")
            return found | logits, cache, "activations"
        except NotImplementedError:
            pass
        try:
            logits = logits or _arrays({"logits": ask(backend, "logits", what, *given)}, "logits")
        except NotImplementedError as error:
            why = str(error)
    return logits, cache, "logits" if logits else f"not covered: {why}"


def _pair(value: Any, name: str) -> tuple[Any, Any]:
    if not isinstance(value, tuple) or len(value) != 2:
        raise InputError(f"--against: {name} must return two things, got {type(value).__name__}")
    return value


def _arrays(found: Any, name: str) -> dict[str, Array]:
    """Widen what a backend returned to float32, or keep it in float64."""
    try:
        arrays = {key: np.asarray(value) for key, value in dict(found).items()}
        return {k: v if v.dtype == np.float64 else v.astype(np.float32) for k, v in arrays.items()}
    except Exception as error:
        why = " ".join(str(error).split())
        raise InputError(f"--against: {name} must return NumPy arrays ({why})") from None
