"""Backends of llama_torch: eager, with one attention kernel, compiled, on a GPU."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import ml_dtypes
import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from llama_torch.checkpoint.hf import load_model
from llama_torch.config import OptimConfig
from llama_torch.model.kv_cache import Cache
from llama_torch.model.llama import Llama
from llama_torch.training import step
from llama_torch.training.batch import Batch as TrainingBatch
from llama_torch.training.objective import TokenLoss
from llama_torch.training.optimizer import learning_rate, make_adamw
from reference_np.backend import Array, Params
from reference_np.config import LlamaConfig
from reference_np.grad import Batch
from reference_np.optim import Hyperparameters

from .mixins import LogitsByDecode, TraceByTracedDecode
from .torch_model import torch_model

HALVES = ("bfloat16", "float16")


class Torch(LogitsByDecode, TraceByTracedDecode):
    """llama_torch on one device, with torch's choice of attention kernel or with ``kernel``."""

    def __init__(
        self,
        device: str = "cpu",
        kernel: SDPBackend | None = None,
        compiler: str = "",
        dtypes: Sequence[str] = ("float64", "float32", *HALVES),
        example_fraction: float = 1.0,
    ) -> None:
        self.device, self.kernel, self.compiler = torch.device(device), kernel, compiler
        self.dtypes, self.example_fraction = dtypes, example_fraction

    def decode(
        self,
        config: LlamaConfig,
        params: Params,
        tokens: Array,
        positions: Array | None,
        mask: Array | None,
        cache: Cache | None,
    ) -> tuple[Array, Cache]:
        model = self._model(config, params)
        inputs = [self._tensor(x) for x in (tokens, positions, mask)]
        cache = self._cache_for(model, tokens, cache)
        with torch.no_grad(), self._pinned(), self._compiled(model):
            logits, cache = model(inputs[0], positions=inputs[1], mask=inputs[2], cache=cache)
        return _array(logits), cache

    def traced_decode(
        self,
        config: LlamaConfig,
        params: Params,
        tokens: Array,
        positions: Array | None,
        mask: Array | None,
        cache: Cache | None,
    ) -> tuple[Mapping[str, Array], Cache]:
        if self.compiler:
            raise NotImplementedError("tracing stops compilation")
        activations: dict[str, Array] = {}
        inputs = [self._tensor(x) for x in (tokens, positions, mask)]

        def trace(name: str, value: torch.Tensor) -> None:
            activations[name] = _array(value)

        with torch.no_grad(), self._pinned():
            model = self._model(config, params)
            cache = self._cache_for(model, tokens, cache)
            _, cache = model(
                inputs[0], positions=inputs[1], mask=inputs[2], cache=cache, trace=trace
            )
        return activations, cache

    def loss_and_grads(
        self, config: LlamaConfig, params: Params, batches: Sequence[Batch], z_loss: float
    ) -> tuple[float, Mapping[str, Array]]:
        model = self._trainable(config, params)
        with self._pinned(), self._compiled(model):
            loss, grads = step.accumulate(model, [to_torch(b) for b in batches], TokenLoss(z_loss))
        return loss.item(), {n: _array(grads[p]) for n, p in model.named_parameters()}

    def train(
        self,
        config: LlamaConfig,
        params: Params,
        batches: Sequence[Batch],
        hyper: Hyperparameters,
        steps: int,
    ) -> Mapping[str, Any]:
        model = self._trainable(config, params)
        settings = optim_config(hyper)
        optimizer = make_adamw(model, settings)
        found: dict[str, Any] = {"loss": [], "grad_norm": []}
        for i in range(steps):
            with self._pinned(), self._compiled(model):
                loss, norm = step.train_step(
                    model,
                    optimizer,
                    [to_torch(b) for b in batches],
                    lr=learning_rate(i, hyper.steps, settings),
                    grad_clip=settings.grad_clip,
                    objective=TokenLoss(hyper.z_loss),
                )
            found["loss"].append(loss.item())
            found["grad_norm"].append(norm.item())
        named = dict(model.named_parameters())
        found["params"] = {n: _array(p.detach()) for n, p in named.items()}
        for kind in ("exp_avg", "exp_avg_sq"):
            found[kind] = {n: _array(optimizer.state[p][kind]) for n, p in named.items()}
        return found

    def _cache_for(self, model: Llama, tokens: Array, cache: Any) -> Any:
        """Return the cache to pass to the model for a call that continues ``cache``."""
        return cache

    def _model(self, config: LlamaConfig, params: Params) -> Llama:
        torch.set_float32_matmul_precision("highest")
        dtype = next(iter(params.values())).dtype
        if dtype == ml_dtypes.bfloat16:
            wide = {name: value.astype(np.float32) for name, value in params.items()}
            model = torch_model(config, wide).to(torch.bfloat16)
        else:
            model = torch_model(config, params)
        return model.to(self.device)

    def _trainable(self, config: LlamaConfig, params: Params) -> Llama:
        if self.compiler and self.device.type == "cpu":
            raise NotImplementedError("on a CPU the trainer does not compile")
        return self._model(config, params).train().requires_grad_(True)

    def _compiled(self, model: Llama) -> AbstractContextManager[None]:
        return _compiling(model, self.compiler) if self.compiler else nullcontext()

    def _tensor(self, value: Array | None) -> torch.Tensor | None:
        return None if value is None else torch.from_numpy(np.array(value)).to(self.device)

    @contextmanager
    def _pinned(self) -> Iterator[None]:
        if self.kernel is None:
            yield
            return
        with warnings.catch_warnings(), sdpa_kernel(self.kernel):
            warnings.simplefilter("ignore")  # torch's reasons for which a kernel does not apply
            try:
                yield
            except RuntimeError as error:
                if "No available kernel" not in str(error) and "No viable" not in str(error):
                    raise
                raise NotImplementedError(f"no {self.kernel.name} kernel for it") from None


class TorchWithLoader(Torch):
    """Torch that also reads a model directory, as every command of llama_torch does."""

    def from_directory(self, path: str, dtype: str) -> Callable[[Array], Array]:
        model = load_model(path, dtype=getattr(torch, dtype), device=self.device)

        def logits(tokens: Array) -> Array:
            with torch.no_grad():
                return _array(model(self._tensor(tokens))[0])

        return logits


@contextmanager
def _compiling(model: Llama, compiler: str) -> Iterator[None]:
    """Compile every block with dynamic sizes of batch, tokens and cache: one graph for all.

    Graphs of earlier models are dropped first, as past a limit torch stops compiling without an
    error.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's compiler uses what torch deprecates
        torch.compiler.reset()
        for block in model.model.layers:
            block.compile(backend=compiler, dynamic=True, fullgraph=True)
        yield


def _array(value: torch.Tensor) -> Array:
    wide = value.float() if value.dtype in (torch.bfloat16, torch.float16) else value
    return wide.cpu().numpy()


def to_torch(batch: Batch) -> TrainingBatch:
    """Return a copy of a batch as torch tensors."""
    return TrainingBatch(*(None if x is None else torch.from_numpy(np.array(x)) for x in batch))


def optim_config(hyper: Hyperparameters) -> OptimConfig:
    """Return the trainer's OptimConfig of the oracle's hyperparameters."""
    return OptimConfig(**{name: value for name, value in vars(hyper).items() if name != "steps"})


_SOME = {"example_fraction": 0.3}
eager = TorchWithLoader()
math = Torch(kernel=SDPBackend.MATH, **_SOME)
flash = Torch(kernel=SDPBackend.FLASH_ATTENTION, **_SOME)
compiled = Torch(compiler="inductor", example_fraction=0.02)
cuda = TorchWithLoader("cuda")
cuda_math = Torch("cuda", SDPBackend.MATH, **_SOME)
cuda_flash = Torch("cuda", SDPBackend.FLASH_ATTENTION, dtypes=HALVES, **_SOME)
cuda_efficient = Torch("cuda", SDPBackend.EFFICIENT_ATTENTION, dtypes=("float32", *HALVES), **_SOME)
cuda_compiled = Torch("cuda", compiler="inductor", example_fraction=0.02)
