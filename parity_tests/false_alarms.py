"""Count how often compare.py says FAIL of honest float32 code; see docs/tolerances.md.

``python -m parity_tests.false_alarms --runs 1000``. Each run draws a model as training makes them
(outlier channels, uneven norms, scores of standard deviation 2 to 10) and compares the whole of it,
run with one kernel of attention, at the end of a long context. Then it judges attention over that
many keys with every kernel, and with every known bug that is inside attention.

Axes: B batch, T queries, H heads, S keys, K head_dim.
"""

import contextlib
import dataclasses
import io
import json
import math
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from llama_common import cli
from llama_common.errors import InputError
from llama_parity import compare
from llama_parity.comparison.judging import Reference
from reference_np import ops
from reference_np.config import LlamaConfig
from reference_np.mutants import FORWARD
from reference_np.naming import parameter_shapes
from reference_np.ops import Array
from reference_np.tolerances import Errors, attention_bound

from .backends.torch_model import save_numpy
from .planted.honest_kernels import KERNELS

# What an attention in too low a precision does; all else is further off.
ROUNDING = [b for b in FORWARD if b.name in ("softmax_low_precision", "matmul_tf32", "matmul_bf16")]


@dataclass(frozen=True)
class AlarmConfig:
    """Count how often compare.py says FAIL of honest float32 code."""

    runs: int = 20
    """Runs of compare, shared among the lengths."""
    lengths: tuple[int, ...] = (512, 2048, 8192, 32768)
    """Contexts of the models: keys that attention sees, and positions at which they stand."""
    layers: int = 3
    """Layers of the models."""
    seed: int = 0
    """Seed of the first run; the next ones follow."""
    threads: int = 1
    """Of torch."""

    def __post_init__(self) -> None:
        if min(self.runs, self.layers, self.threads, *self.lengths) < 1:
            raise InputError("--runs, --lengths, --layers and --threads must be positive")


def trained(config: LlamaConfig, rng: np.random.Generator) -> dict[str, Array]:
    """Draw parameters as training leaves them."""
    outliers, peaked = rng.choice(config.dim, 3, replace=False), rng.uniform(2, 10)
    params = {}
    for name, shape in parameter_shapes(config).items():
        value = rng.standard_normal(shape)
        if len(shape) == 1:
            value = np.exp(value / 2)
            value[outliers] /= 20  # as trained norms do with what is large
        elif "embed" in name:
            value[:, outliers] *= rng.uniform(100, 1000, 3)
        else:
            value *= (5 if "o_proj" in name or "down_proj" in name else 1) / math.sqrt(shape[1])
        params[name] = value
    stream = params["model.embed_tokens.weight"]
    stream = stream / np.sqrt(np.mean(stream**2, axis=-1, keepdims=True))
    for name in params:
        if "q_proj" in name or "k_proj" in name:
            norm = params[f"{name.partition('self_attn')[0]}input_layernorm.weight"]
            params[name] *= math.sqrt(peaked) / np.std((stream * norm) @ params[name].T)
    return {name: value.astype(np.float32) for name, value in params.items()}


def whole_run(config: LlamaConfig, rng: np.random.Generator, against: str, folder: Path) -> float:
    """Compare a drawn model; return the largest share of a bound, above 1 exactly if it failed."""
    path, ids = folder / "model.safetensors", rng.integers(0, config.vocab_size, 24)
    save_numpy(trained(config, rng), path, {"config": config.to_json()})
    argv = [
        str(path),
        "--against",
        f"parity_tests.planted.honest_kernels:{against}",
        "--ids",
        *map(str, ids),
    ]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        failed = compare.main([*argv, "--no-diagnose", "--json", "-"])
    rows = json.loads(out.getvalue())["rows"]
    share: float = max(row[k]["share"] for row in rows for k in ("inherited", "fresh") if row[k])
    assert failed == (share > 1), "a run failed for another reason than an error"
    return share


def draw(rng: np.random.Generator, keys: int) -> tuple[Array, Array, Array]:
    """Draw queries [B, T, H, K], keys and values [B, H, S, K] for two queries and two heads."""
    q, k, v = (rng.standard_normal((1, 2, n, 64)) for n in (2, keys, keys))
    large = rng.choice(64, 2, replace=False)
    k[..., large] *= rng.choice([1, 5, 20])
    k += rng.standard_normal((1, 2, 1, 64)) * rng.choice([0, 1, 3])
    v += rng.standard_normal((1, 2, 1, 64)) * rng.choice([0, 1])
    v[..., rng.integers(64)] *= rng.choice([1, 30])
    q *= rng.uniform(2, 10) / np.std(ops.attention_scores(q[:, :, None], k))
    return q.swapaxes(1, 2).astype(np.float32), k.astype(np.float32), v.astype(np.float32)


def attention(q: Array, k: Array, v: Array, mask: Array, make: object = ops) -> Array:
    """Return the oracle's attention [B, T, H, K], or a mutant's."""
    o = vars(make)
    scores = o["attention_scores"](o["group_queries"](q, k.shape[1]), k)
    mixed = o["attention_mix"](o["masked_softmax"](scores, mask), v)
    found: Array = o["ungroup_queries"](mixed)
    return found


def honest_outputs(q: Array, k: Array, v: Array, mask: Array) -> dict[str, Array]:
    """Return every kernel's attention [B, T, H, K]."""
    given = [torch.from_numpy(np.ascontiguousarray(x)) for x in (q.swapaxes(1, 2), k, v, mask)]
    return {name: kernel(*given).transpose(1, 2).numpy() for name, kernel in KERNELS.items()}


def attention_run(keys: int, rng: np.random.Generator) -> tuple[float, float]:
    """Judge attention over many keys; return the largest honest share and the least of a bug."""
    q, k, v = draw(rng, keys)
    mask = np.ones((1, q.shape[1], keys), dtype=bool)
    wide = q.astype(np.float64), k.astype(np.float64), v.astype(np.float64)
    exact, allowed = attention(*wide, mask), attention_bound(*wide, mask, "float32")
    reference = Reference(exact, Errors(0, 0, 0), allowed)
    honest = honest_outputs(q, k, v, mask).values()
    wrong = [attention(q, k, v, mask, bug.apply(ops)) for bug in ROUNDING]
    found, bugs = ([reference.measure(x).share for x in made] for made in (honest, wrong))
    return max(found), min(bugs)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code: 1 if an honest run failed."""
    return cli.run(lambda: _main(sys.argv[1:] if argv is None else argv))


def _main(argv: Sequence[str]) -> int:
    settings = cli.parse(AlarmConfig, argv)
    torch.set_num_threads(settings.threads)
    found: dict[int, list[tuple[float, float, float]]] = {n: [] for n in settings.lengths}
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        for run in range(settings.runs):
            length = settings.lengths[run % len(settings.lengths)]
            against = [*KERNELS][run // len(settings.lengths) % len(KERNELS)]
            rng = np.random.default_rng(settings.seed + run)
            config = LlamaConfig(96, settings.layers, 3, 1, 32, 192, 300, rope_theta=1e5)
            config = dataclasses.replace(config, max_seq_len=length, tie_embeddings=True)
            whole = whole_run(config, rng, against, Path(folder))
            found[length].append((whole, *attention_run(length, rng)))
            if max(found[length][-1][:2]) > 1:
                print(f"seed {settings.seed + run}, {length} keys, {against}: {found[length][-1]}")
    print(f"{torch.backends.cpu.get_cpu_capability()}, {settings.threads} threads")
    alarms = 0
    for length, runs in found.items():
        if runs:
            whole, honest, bug = np.array(runs).T
            alarms += (failed := int(np.sum(np.maximum(whole, honest) > 1)))
            print(
                f"{length:6} keys: {failed} of {len(runs)} runs alarm; largest share of a bound: "
                f"{whole.max():.2f} (whole model), {honest.max():.2f} (attention over all keys); "
                f"rounding bugs in it: median {np.median(bug):.3g}, least {bug.min():.2g}"
            )
    print(f"{alarms} false alarms in {settings.runs} runs; {time.monotonic() - began:.0f} s")
    return 1 if alarms else 0


if __name__ == "__main__":
    sys.exit(main())
