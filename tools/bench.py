"""Speed beside Hugging Face's Llama, measured alternately in one run: ``python tools/bench.py``.

Both sides get the same shape, weights, dtype, threads and tokens. A row is the median of
several repeats; the ratio is the median of the ratios of neighbouring repeats, so that a
machine whose speed drifts still gives a fair one.
"""

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from llama_torch import cli
from llama_torch.batch import generate
from llama_torch.config import InputError, ModelConfig, OptimConfig
from llama_torch.device import pick_device
from llama_torch.generation_config import SamplingConfig
from llama_torch.model import Llama
from llama_torch.optim import make_adamw
from llama_torch.step import Precision, split_window, train_step


@dataclass(frozen=True)
class BenchConfig:
    """Measure training and decoding speed beside transformers' Llama."""

    repeats: int = 7
    """Timed repeats of each side."""
    batch_size: int = 4
    """Windows in a training step."""
    new_tokens: int = 128
    """Tokens decoded after a prompt of the same length."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Training: autocast to it; decoding: the weights' precision."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run."""

    def __post_init__(self) -> None:
        for name in ("repeats", "batch_size", "new_tokens"):
            if getattr(self, name) < 1:
                flag = name.replace("_", "-")
                raise InputError(f"--{flag} must be positive, got {getattr(self, name)}")


def peer_model(config: ModelConfig, ours: Llama) -> Any:
    """Build transformers' Llama with the same weights and SDPA attention."""
    try:
        import transformers
    except ImportError:
        raise InputError("the peer is transformers; pip install 'llama-parity[test]'") from None
    settings: dict[str, Any] = config.to_hf() | {"attn_implementation": "sdpa"}
    peer = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings))
    missing, extra = peer.load_state_dict(ours.state_dict(), strict=False)
    assert not extra
    assert set(missing) <= {"lm_head.weight"}  # tied
    return peer


def peer_step(
    peer: Any, optimizer: torch.optim.Optimizer, window: Tensor, precision: Precision
) -> None:
    """Take the same training step with the peer's own loss."""
    tokens, targets, *_ = split_window(window.to(precision.device))
    targets = targets.contiguous()  # older releases view them
    with precision.autocast():
        # shift_labels: the targets as they are, without the peer's own shift.
        loss = peer(tokens, labels=targets, shift_labels=targets, use_cache=False).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(peer.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def alternate(
    ours: Callable[[], object], peer: Callable[[], object], repeats: int, device: torch.device
) -> tuple[list[float], list[float]]:
    """Time both in turn, after one uncounted call of each; return the seconds of each."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for repeat in range(repeats + 1):
        for call, times in zip((ours, peer), seconds, strict=True):
            if device.type == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if repeat:
                times.append(time.perf_counter() - start)
    return seconds


def bench_training(
    config: BenchConfig, shape: ModelConfig, device: torch.device
) -> tuple[int, tuple[list[float], list[float]]]:
    """Time one optimizer step of each side; return the tokens in it and the seconds."""
    precision = Precision(device, getattr(torch, config.dtype))
    model = Llama(shape)
    model.init_weights(torch.Generator().manual_seed(0))
    peer = peer_model(shape, model).to(device).train()
    model.to(device)
    optimizers = make_adamw(model, OptimConfig()), make_adamw(peer, OptimConfig())
    rows = (config.batch_size, shape.max_seq_len + 1)
    window = torch.randint(0, shape.vocab_size, rows, generator=torch.Generator().manual_seed(1))

    def our_step() -> None:
        batches = [split_window(window)]
        train_step(model, optimizers[0], batches, lr=3e-4, grad_clip=1.0, precision=precision)

    seconds = alternate(
        our_step,
        lambda: peer_step(peer, optimizers[1], window, precision),
        config.repeats,
        device,
    )
    return config.batch_size * shape.max_seq_len, seconds


def bench_decoding(
    config: BenchConfig, shape: ModelConfig, device: torch.device
) -> tuple[int, tuple[list[float], list[float]]]:
    """Time greedy decoding with the cache; return the new tokens and the seconds."""
    dtype = getattr(torch, config.dtype)
    model = Llama(shape)
    model.init_weights(torch.Generator().manual_seed(0))
    peer = peer_model(shape, model).to(device, dtype).eval()
    model.to(device, dtype)
    prompt = list(range(1000, 1000 + shape.max_seq_len - config.new_tokens))
    inputs = torch.tensor([prompt], device=device)

    def peer_call() -> Tensor:
        with torch.inference_mode():
            out: Tensor = peer.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                max_new_tokens=config.new_tokens,
                min_new_tokens=config.new_tokens,
                do_sample=False,
                pad_token_id=0,
            )
        return out

    def our_call() -> list[int]:
        return list(generate(model, prompt, SamplingConfig(config.new_tokens, temperature=0)))

    if config.dtype == "float32" and peer_call()[0, len(prompt) :].tolist() != our_call():
        raise RuntimeError("the two sides decode different tokens; their speed says nothing")
    return config.new_tokens, alternate(our_call, peer_call, config.repeats, device)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    return cli.run(lambda: _main(sys.argv[1:] if argv is None else argv))


def _main(argv: Sequence[str]) -> int:
    config = cli.parse(BenchConfig, argv)
    device = pick_device(config.device)
    shape = ModelConfig()
    decoding_shape = ModelConfig(max_seq_len=2 * config.new_tokens)
    table = Table(title=f"default model, {config.dtype}, {device}, torch {torch.__version__}")
    for heading in ("work", "ours tokens/s", "transformers tokens/s", "ratio", "repeats"):
        table.add_column(heading, justify="left" if heading == "work" else "right")
    for work, (tokens, (ours, peer)) in (
        ("training step", bench_training(config, shape, device)),
        ("greedy decoding", bench_decoding(config, decoding_shape, device)),
    ):
        ratio = statistics.median(b / a for a, b in zip(ours, peer, strict=True))
        speeds = [f"{tokens / statistics.median(times):,.0f}" for times in (ours, peer)]
        table.add_row(work, *speeds, f"{ratio:.2f}", str(config.repeats))
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
