"""Find the other side of a comparison, which ``--against`` names."""

import dataclasses
import importlib.util
import os
from pathlib import Path

from safetensors import safe_open

from reference_np import backend as backends
from reference_np.config import InputError, LlamaConfig
from reference_np.limits import Limits

from .backend_side import make_backend_side
from .port_names import require_importable
from .python_source import naming_hint
from .sides import Side
from .source import Source, open_checkpoint
from .trace_file import TraceFile
from .trace_format import FORMAT

DTYPES = ("float64", "float32", "bfloat16", "float16")

STREAMED = ("torch", "cuda", "hf")  # run with their weights read layer by layer


def find_side(spec: str, dtype: str, checkpoint: Source) -> Side:
    """Return the other side that ``spec`` names, in ``dtype`` ("" = its own, or float32).

    Raises InputError for a name of nothing known, another architecture, or another precision.
    """
    kind, _, suffix = spec.partition(":")
    if kind in STREAMED and suffix in ("", *DTYPES):
        if suffix and dtype not in ("", suffix):
            raise InputError(f"--against {spec} and --dtype {dtype} disagree; drop one")
        return _torch_side(kind, suffix or dtype or "float32", checkpoint.path, spec)
    path = Path(spec)
    named = spec in backends.SHIPPED or (path.exists() and path.suffix != ".py")
    if not named and (hint := naming_hint(spec, "--against")):
        raise InputError(hint)
    if spec and os.path.exists(path):
        if path.is_file() and _is_trace(path):
            trace = TraceFile(path)
            _require_same(trace.config, checkpoint, spec)
            if dtype not in ("", trace.dtype):
                raise InputError(f"--dtype {dtype}: {spec} was computed in {trace.dtype}; drop it")
            declared = (trace.dtype,) if trace.float32_angles else ()
            limits = Limits(float32_angles=declared)
            return Side(f"the trace {spec}", trace.dtype, None, trace, limits=limits)
        _require_same(open_checkpoint(path).config, checkpoint, spec)
        side = _torch_side("torch", dtype or "float32", path, spec)
        return side._replace(title=f"torch with the weights of {spec}", weights=path)
    if spec in backends.SHIPPED or ":" in spec:
        if spec not in backends.SHIPPED:
            require_importable(spec, "--against")
        return make_backend_side(spec, dtype, checkpoint)
    names = f", or one of {', '.join(dict.fromkeys([*STREAMED, *backends.SHIPPED]))}"
    raise InputError(
        f"--against {spec}: no such file; give a checkpoint, a trace, package.module:object or "
        f"FILE.py:object{'' if path.suffix or len(path.parts) > 1 else names}"
    )


def _torch_side(kind: str, dtype: str, path: Path, spec: str) -> Side:
    """Return make_torch_side's side; InputError where PyTorch is not installed."""
    if importlib.util.find_spec("torch") is None:
        raise InputError(
            f"--against {spec}: needs PyTorch; pip install 'llama-parity[torch]', or give a trace, "
            "package.module:object or FILE.py:object"
        )
    from .torch_side import make_torch_side

    return make_torch_side(kind, dtype, path, spec)


def _is_trace(path: Path) -> bool:
    try:
        with safe_open(path, framework="np") as file:
            return (file.metadata() or {}).get("format") == FORMAT
    except Exception:  # the checkpoint's reader says what is wrong with the file
        return False


def _require_same(config: LlamaConfig, checkpoint: Source, spec: str) -> None:
    if config != checkpoint.config:
        ours, theirs = (dataclasses.asdict(c) for c in (checkpoint.config, config))
        wrong = [f"{k} {theirs[k]} for {ours[k]}" for k in ours if ours[k] != theirs[k]]
        raise InputError(
            f"--against {spec}: another architecture than {checkpoint.path} ({', '.join(wrong)}); "
            "give one of the same config"
        )
