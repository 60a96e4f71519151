"""Record the activations of llama_torch or transformers, their weights read layer by layer.

The torch modules of both name their parameters as Hugging Face does.
"""

import dataclasses
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn

from llama_common.files import parse_json, read_json
from llama_torch.checkpoint.hf import locate, read_tensor
from llama_torch.checkpoint.weight_files import weight_files
from llama_torch.model.config import ModelConfig
from llama_torch.model.llama import Llama
from reference_np.config import InputError, LlamaConfig
from reference_np.limits import UNLIMITED, Limits
from reference_np.naming import EMBED, LM_HEAD

from ..conversion.file_kinds import is_gguf
from ..conversion.gguf_checkpoint import GgufCheckpoint
from ..conversion.gguf_model import model_of
from .sides import Advance, Side
from .trace_file import TraceWriter
from .trace_format import Call

# transformers multiplies position and frequency in float32. In float64 that is lifted.
TRANSFORMERS_LIMITS = Limits(float32_angles=("float32", "bfloat16", "float16"))


def stream_weights(
    model: nn.Module, read: Callable[[str], Tensor], keep: Sequence[str] = ()
) -> None:
    """Make every module of a meta model read its parameters before it runs and drop them after.

    Those of the modules named in ``keep`` are read now and kept.
    """
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


def make_torch_side(kind: str, dtype: str, path: Path, spec: str) -> Side:
    """Return torch, torch on a GPU ("cuda") or transformers ("hf") as a side of a comparison.

    Each reads the config of the checkpoint at ``path`` by its own means. Raises InputError, which
    quotes ``spec``, where there is no GPU or no transformers.
    """
    if kind == "cuda":
        require_cuda(spec)
    device = torch.device("cuda" if kind == "cuda" else "cpu")
    torch_dtype = getattr(torch, dtype)
    if kind == "hf" and importlib.util.find_spec("transformers") is None:
        raise InputError(f"--against {spec}: needs transformers; pip install transformers")
    own, stored = _opened(path)

    def read(name: str) -> Tensor:
        if own.tie_embeddings and name == LM_HEAD:
            name = EMBED
        return stored(name).to(device, torch_dtype)

    def write(
        writer: TraceWriter, calls: Sequence[Call], config: LlamaConfig, advance: Advance
    ) -> list[str]:
        if kind == "hf":
            forward = transformers_forward(path, config.n_layers, read, torch_dtype, spec)
        else:
            forward = llama_forward(
                dataclasses.replace(own, n_layers=config.n_layers), read, device
            )
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
    limits = TRANSFORMERS_LIMITS if kind == "hf" else UNLIMITED
    return Side(f"{title}, the same weights", dtype, write, backend=shipped, limits=limits)


def require_cuda(spec: str) -> None:
    """Raise InputError, which quotes ``spec``, where there is no GPU."""
    if not torch.cuda.is_available():
        raise InputError(f"--against {spec}: torch sees no CUDA device here; use torch instead")


def _opened(path: Path) -> tuple[ModelConfig, Callable[[str], Tensor]]:
    """Return a checkpoint's config, and a function that reads a parameter as it is stored."""
    if is_gguf(path):
        model = model_of(GgufCheckpoint(path))
        return model.config, lambda name: model.weights[name].read()
    config, files = locate(path)
    return config, lambda name: read_tensor(files[name].file, name, files[name].dtype)


Forward = Callable[[Call, Any, Callable[[str, Tensor], None]], Any]  # call, cache, trace -> cache


def llama_forward(
    config: ModelConfig, read: Callable[[str], Tensor], device: torch.device
) -> Forward:
    """Return a function that runs llama_torch's Llama on a call; ``read`` reads one parameter."""
    with torch.device("meta"):
        model = Llama(config).eval()
    # The head reads a tied embedding too, after the embedding's module has run.
    stream_weights(model, read, ["model.embed_tokens"] if config.tie_embeddings else [])

    def forward(call: Call, cache: Any, note: Callable[[str, Tensor], None]) -> Any:
        tokens, positions, mask = (
            None if x is None else torch.from_numpy(np.array(x)).to(device)
            for x in (call.tokens, call.positions, call.mask)
        )
        return model(tokens, positions=positions, mask=mask, cache=cache, trace=note)[1]

    return forward


def transformers_forward(
    path: Path, n_layers: int, read: Callable[[str], Tensor], dtype: torch.dtype, spec: str
) -> Forward:
    """Return a function that runs transformers' Llama on a call; ``read`` reads one parameter.

    Raises InputError, which quotes ``spec``, for a config that transformers cannot run.
    """
    from . import transformers_model

    try:
        model = transformers_model.empty_model(
            transformers_model.config_from(_raw_config(path), n_layers), dtype
        )
    except NotImplementedError as error:
        raise InputError(f"--against {spec}: cannot run this config: {error}") from None
    stream_weights(model, read)

    def forward(call: Call, cache: Any, note: Callable[[str, Tensor], None]) -> Any:
        with transformers_model.tracing(model, note):
            return transformers_model.call(model, call.tokens, call.positions, call.mask, cache)[1]

    return forward


def _raw_config(path: Path) -> dict[str, Any]:
    """Return config.json as a dictionary, read from beside the weights or from their metadata."""
    if is_gguf(path):
        return GgufCheckpoint(path).hf
    beside = (path if path.is_dir() else path.parent) / "config.json"
    if beside.is_file():
        return read_json(beside)
    with safe_open(weight_files(path)[0], framework="pt") as file:
        return parse_json(file.metadata()["config"], str(path))
