"""The Triton kernels at sizes that take several tiles, shares and blocks, with leftovers in each.

test_conformance's models are small: there one tile holds a row, one block all keys. Needs a GPU,
or TRITON_INTERPRET=1 and a triton whose interpreter works here; skipped without either.
"""

import importlib.util
import os
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from llama_torch.inference.step_inputs import StepInputs
from llama_torch.model import loss
from llama_torch.model.kv_cache import StaticCache
from reference_np import ops
from reference_np.config import LlamaConfig
from reference_np.model import forward
from reference_np.tolerances import (
    FLOAT64_TOLERANCE,
    FLOOR_ROUNDINGS,
    UNIT_ROUNDOFF,
    composed_bound,
    errors,
    max_relative_error,
)

from ..backends.decoding_backends import BatchKernels, Kernels
from ..backends.torch_model import torch_model
from ..conformance.oracle import Baseline
from ..conformance.strategies import Array, padded, random_params

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="no CUDA device here")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton")
pytestmark = pytest.mark.skipif(
    not ON_GPU and not INTERPRETED,
    reason="no CUDA device here, and TRITON_INTERPRET is not 1",
)
DTYPES = {"float64": np.float64, "float32": np.float32, "bfloat16": ml_dtypes.bfloat16}


@pytest.fixture(autouse=True)
def _words_without_assembly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the kernels' inline assembly, which the interpreter lacks, by the same in Triton."""
    if ON_GPU:
        return
    from llama_torch.kernels import gemv

    from ..support.interpreted import numbers

    monkeypatch.setattr(gemv, "_numbers", numbers)


def require_close(found: Array, exact: Array, plain: Array | None, dtype: str) -> None:
    """Assert that logits are within FLOAT64_TOLERANCE, or the bound of the baseline ``plain``."""
    if plain is None:
        assert max_relative_error(found, exact) <= FLOAT64_TOLERANCE
        return
    bound = composed_bound(errors(plain, exact), dtype)
    assert errors(found, exact).share(bound) <= 1


def require_decoding(
    kind: Any, config: LlamaConfig, precision: str, lengths: list[int], positions_too: bool
) -> None:
    """Assert that decoding rows of these lengths, padded on the left, gives the oracle's logits."""
    dtype = "float64" if precision == "int8" else precision
    params = {n: v.astype(DTYPES[dtype]) for n, v in random_params(config, 7).items()}
    backend = kind(DEVICE.type, quantized="int8" if precision == "int8" else "none")
    exact_params = {n: v.astype(np.float64) for n, v in params.items()}
    if precision == "int8":
        exact_params = backend.effective_params(config, params)
    positions, mask, real = padded(lengths, left=True)
    # Rotation is relative: with positions one apart in every row, any row's would do for all.
    positions *= np.arange(1, len(lengths) + 1)[:, None]
    tokens = np.random.default_rng(1).integers(0, config.vocab_size, real.shape)
    given = (tokens, positions, mask) if positions_too else (tokens, None, None)
    exact = forward(exact_params, tokens, config, positions=given[1], mask=given[2])[0]
    plain = None if dtype == "float64" else Baseline(dtype).logits(config, params, *given)
    found, _ = backend.decode(config, params, *given, None)
    require_close(np.asarray(found), exact, plain, dtype)


# Of a matrix's row a program reads 1,024 numbers at a time (int8: 1,024 or 2,048), and 4,096 from
# that dim on; int8 is read in words where 4 divides every width.
SHAPES = {
    "one_tile": LlamaConfig(21, 2, 6, 2, 8, 23, 31),
    "three_tiles_with_leftovers": LlamaConfig(2100, 1, 3, 1, 12, 1060, 37),
    "whole_tiles": LlamaConfig(2048, 1, 2, 2, 16, 2048, 40),
    "wide": LlamaConfig(4100, 1, 2, 1, 8, 1100, 33),
}
# The interpreter takes milliseconds for each program: it gets tiles of 32, of int8 8 words.
INTERPRETED_SHAPES = {
    "one_tile": SHAPES["one_tile"],
    "three_tiles_with_leftovers": LlamaConfig(76, 1, 3, 1, 12, 44, 37),
    "whole_tiles": LlamaConfig(64, 1, 2, 2, 16, 64, 40),
}
NARROW = {"qkv": (2, 32, 4), "ffn": (4, 32, 4), "one": (4, 32, 2)}
INT8 = {"qkv": (4, 8, 2), "ffn": (4, 8, 4), "one": (4, 8, 2)}


@pytest.mark.parametrize("precision", ["float64", "float32", "bfloat16", "int8"])
@pytest.mark.parametrize("shape", SHAPES if ON_GPU else INTERPRETED_SHAPES)
def test_one_sequence_is_decoded_as_the_oracle_computes_it(
    shape: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cache positions that are not written yet are filled, and must not change the result."""
    from llama_torch.inference import triton_step

    shapes = SHAPES
    if not ON_GPU:
        shapes = INTERPRETED_SHAPES
        monkeypatch.setattr(triton_step, "TILES", {"narrow": NARROW, "int8": INT8})
    require_decoding(Kernels, shapes[shape], precision, [3], positions_too=False)


# A program takes 64 rows of a matrix and 256 bytes of its columns at a time: 32 of float64.
BATCHES = {
    "less_than_a_block": LlamaConfig(20, 2, 6, 2, 8, 23, 31),
    "not_whole_shares": LlamaConfig(96, 1, 6, 3, 16, 160, 70),
    "leftovers": LlamaConfig(131, 1, 9, 3, 24, 190, 129),
    "whole_shares": LlamaConfig(256, 1, 4, 1, 32, 128, 64),
}


@pytest.mark.parametrize(
    ("shape", "precision", "rows", "splits"),
    [
        ("less_than_a_block", "float64", 3, 1),
        ("less_than_a_block", "int8", 3, 4),
        ("not_whole_shares", "float64", 2, 4),
        ("leftovers", "float64", 17, 2),
        ("leftovers", "float32", 3, 4),
        ("leftovers", "int8", 3, 2),
        ("whole_shares", "float64", 2, 4),
        ("whole_shares", "float32", 33, 1),
        ("whole_shares", "bfloat16", 3, 2),
    ],
)
def test_several_sequences_are_decoded_as_the_oracle_computes_them(
    shape: str, precision: str, rows: int, splits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of unequal length, each at its own positions; products are split ``splits`` ways."""
    from llama_torch.inference import triton_batch_step

    monkeypatch.setattr(triton_batch_step, "SPLITS", (splits,))
    lengths = [3, 2, *[1 + i % 3 for i in range(rows - 2)]]
    require_decoding(BatchKernels, BATCHES[shape], precision, lengths, positions_too=True)


@pytest.mark.parametrize(
    ("shares", "rows", "masked", "config"),
    [
        (1, 1, True, LlamaConfig(8, 1, 2, 1, 8, 8, 9)),
        (3, 2, True, LlamaConfig(8, 1, 6, 2, 10, 8, 9)),
        (9, 1, False, LlamaConfig(8, 1, 3, 3, 16, 8, 9)),
    ],
)
def test_attention_joins_its_shares_of_many_keys(
    shares: int, rows: int, masked: bool, config: LlamaConfig
) -> None:
    """Scores near one, of thousands, and all far below zero; masked keys and values are NaN.

    All lengths use the same buffers: the results of an earlier call must not change a later one.
    """
    from llama_torch.inference.triton_step import KEYS_PER_BLOCK, TritonBuffers

    size = 9 * KEYS_PER_BLOCK
    model = torch_model(config, random_params(config, 0)).to(DEVICE)
    cache = StaticCache(model.config, rows, size, torch.float64, DEVICE)
    inputs = StepInputs(rows, size, 1, DEVICE)
    allowed, programs = inputs.key_mask, shares * rows * config.n_heads
    buffers = TritonBuffers(model, cache, inputs, allowed if masked else None, 0, programs)
    mixed = torch.zeros_like(buffers.q)
    assert buffers.n_splits == shares
    rng = np.random.default_rng(3)
    for length in (1, KEYS_PER_BLOCK, KEYS_PER_BLOCK + 1, 5 * KEYS_PER_BLOCK - 1, size - 1, size):
        for scale, offset in ((1.0, 0.0), (3000.0, 0.0), (1.0, -1e4)):
            case = attention_case(rng, config, rows, length, masked, scale, offset)
            for buffer, values in ((cache.keys, case.keys), (cache.values, case.values)):
                buffer.fill_(torch.nan)
                buffer[0, :, :, :length] = torch.from_numpy(values)
            allowed.zero_()
            allowed[:, :length] = torch.from_numpy(case.allowed)
            buffers.q.copy_(torch.from_numpy(case.q).flatten(1))
            inputs.cache_position.fill_(length - 1)
            buffers.attend(0, mixed)
            found = mixed.view(case.expected.shape).cpu().numpy()
            assert max_relative_error(found, case.expected) <= FLOAT64_TOLERANCE, (
                length,
                scale,
                offset,
            )


def attention_case(
    rng: np.random.Generator,
    c: LlamaConfig,
    rows: int,
    length: int,
    masked: bool,
    scale: float,
    offset: float,
) -> SimpleNamespace:
    """Draw q [M, H, K], keys and values [M, N, S, K], allowed [M, S]; compute attention's output.

    If ``masked``, a whole block is hidden, and the newest key is not marked as allowed although it
    is attended to: a token always attends to itself.
    """
    shape = rows, c.n_kv_heads, length, c.head_dim
    q = rng.standard_normal((rows, c.n_heads, c.head_dim)) * scale
    keys, values = rng.standard_normal(shape), rng.standard_normal(shape)
    q[..., 0], keys[..., 0] = 1.0, offset
    allowed = rng.random((rows, length)) < (0.7 if masked else 1.0)
    if masked:
        allowed[:, 64:96] = allowed[:, -1] = False
    seen = allowed | (np.arange(length) == length - 1)
    scores = ops.attention_scores(ops.group_queries(q[:, None], c.n_kv_heads), keys)
    mixed = ops.attention_mix(ops.masked_softmax(scores, seen[:, None]), values)
    expected = ops.ungroup_queries(mixed)[:, 0]
    hidden = ~np.broadcast_to(seen[:, None], shape[:3])
    keys[hidden] = values[hidden] = np.nan
    return SimpleNamespace(q=q, keys=keys, values=values, allowed=allowed, expected=expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("vocab_size", "padding"), [(1, 0), (31, 33), (4096, 0), (4097, 63), (4090, 110), (8193, 7)]
)
def test_logits_become_their_derivative_in_one_kernel(
    vocab_size: int, padding: int, dtype: torch.dtype
) -> None:
    """Across the kernel's blocks of 4,096 columns; padding with large numbers is ignored."""
    from llama_torch.kernels.cross_entropy import differentiate

    rng = np.random.default_rng(vocab_size)
    rows = 12
    drawn = rng.standard_normal((rows, vocab_size + padding)) * np.array([1, 30, 1000] * 4)[:, None]
    drawn[3] -= 1000.0
    drawn[:, vocab_size:] = 1e4
    targets = torch.from_numpy(rng.integers(0, vocab_size, rows))
    borders = [i for i in (0, 4095, 4096, vocab_size - 1) if i < vocab_size]
    targets[: len(borders)] = torch.tensor(borders)
    targets[8:10] = loss.IGNORE_INDEX
    for z_loss in (0.0, 0.1):
        logits = torch.from_numpy(drawn).to(DEVICE, dtype)
        exact = logits[:, :vocab_size].double().cpu().requires_grad_()
        log_z = exact.logsumexp(-1)
        expected = torch.nn.functional.cross_entropy(exact, targets, reduction="sum")
        expected = (expected + z_loss * (log_z.square() * (targets != -100)).sum()) / 7
        expected.backward()
        found = differentiate(logits, targets.to(DEVICE), vocab_size, 1 / 7, z_loss)
        # Logits of 1,000 leave float32 a few thousand roundings of the largest exponent.
        unit = UNIT_ROUNDOFF["float32"]
        assert found.item() == pytest.approx(expected.item(), rel=FLOOR_ROUNDINGS * unit)
        kept = UNIT_ROUNDOFF["bfloat16"] if dtype == torch.bfloat16 else unit
        factor = 1 + 2 * z_loss * log_z.detach().abs()[:, None]
        bound = (
            FLOOR_ROUNDINGS
            * factor
            / 7
            * (kept + unit * exact.detach().abs().amax(1, keepdim=True))
        )
        wrong = (logits[:, :vocab_size].double().cpu() - exact.grad).abs()
        assert (wrong <= bound).all()
        assert not logits[:, vocab_size:].any()
        assert not logits[8:10].any()


@needs_gpu
@pytest.mark.parametrize("vocab_size", [65, 128, 4097])
def test_a_loss_in_pieces_has_float64s_gradients(
    vocab_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bfloat16, with ignored targets and rows of zeros beyond the vocabulary."""
    monkeypatch.setattr(loss, "CHUNK_BYTES_CUDA", 7 * 2 * vocab_size)
    draw = torch.Generator().manual_seed(vocab_size)
    hidden = (torch.randn(2, 45, 24, generator=draw) / 5).bfloat16()  # logits near one
    head = torch.randn(vocab_size, 24, generator=draw).bfloat16()
    targets = torch.randint(vocab_size, (2, 45), generator=draw)
    targets[0, 3:30] = loss.IGNORE_INDEX
    exact = [x.double().requires_grad_() for x in (hidden, head)]
    expected = loss.loss_sum(*exact, targets, z_loss=1e-2) / 50
    expected.backward()
    found = [x.to(DEVICE).requires_grad_() for x in (hidden, head)]
    total = loss.backward_loss(*found, targets.to(DEVICE), 50, z_loss=1e-2)
    unit = UNIT_ROUNDOFF["bfloat16"]
    assert total.item() == pytest.approx(expected.item(), rel=FLOOR_ROUNDINGS * unit)
    for mine, right in zip(found, exact, strict=True):
        wrong = (mine.grad.double().cpu() - right.grad).norm() / right.grad.norm()
        assert wrong <= FLOOR_ROUNDINGS * unit
