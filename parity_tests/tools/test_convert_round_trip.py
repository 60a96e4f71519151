"""convert.py: bits that come back, and logits that Meta's own equations give."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from llama_torch.checkpoint.hf import load_model, locate
from llama_torch.model.config import ModelConfig
from reference_np.config import LlamaConfig

from ..conformance.architectures import seeds
from ..conformance.strategies import random_params
from ..support.meta_checkpoints import (
    CONFIG,
    DTYPES,
    LAYER,
    LLAMA3_SCALING,
    Cut,
    assert_same_bits,
    meta_params,
    meta_tensors,
    read_hf,
    read_meta,
    write_hf,
    write_meta,
)
from .commands import run_convert


@st.composite
def cuts(draw: st.DrawFn) -> Cut:
    """Any head counts, n_rep != n_kv_heads included, and everything divisible by the files."""
    shards = draw(st.integers(1, 3), label="shards")
    n_kv_heads = shards * draw(st.integers(1, 3), label="n_kv_heads / shards")
    n_heads = n_kv_heads * draw(st.integers(1, 3), label="n_rep")
    head_dim = 2 * draw(st.integers(1, 5), label="head_dim / 2")
    scaling: dict[str, Any] = draw(st.sampled_from([{}, LLAMA3_SCALING]), label="scaling")
    if scaling:
        scaling = scaling | {"rope_factor": draw(st.sampled_from([8.0, 32.0]), label="factor")}
    config = LlamaConfig(
        dim=n_heads * head_dim,
        n_layers=draw(st.integers(1, 2), label="n_layers"),
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        hidden_dim=shards * draw(st.integers(1, 20), label="hidden_dim / shards"),
        vocab_size=shards * draw(st.integers(2, 12), label="vocab_size / shards"),
        max_seq_len=draw(st.integers(2, 9999), label="max_seq_len"),
        norm_eps=draw(st.sampled_from([1e-5, 1e-6]), label="norm_eps"),
        rope_theta=draw(st.sampled_from([1e4, 5e5, 1e6, 500.0, 9999.0]), label="rope_theta"),
        tie_embeddings=draw(st.booleans(), label="tie_embeddings"),
        **scaling,
    )
    dtype = DTYPES[draw(st.sampled_from(sorted(DTYPES)), label="dtype")]
    return Cut(config, dtype, shards, draw(seeds, label="weights seed"))


def hf_tensors(cut: Cut) -> dict[str, Tensor]:
    """Weights by Hugging Face's names, with values that compare unequal to themselves or equal."""
    params = random_params(cut.config, cut.seed)
    tensors = {name: torch.from_numpy(value).to(cut.dtype) for name, value in params.items()}
    for value in tensors.values():
        value.view(-1)[:2] = torch.tensor([torch.nan, -0.0])[: value.numel()]
    return tensors


def meta_rotation(params: dict[str, Any], head_dim: int, length: int) -> Tensor:
    """Unit complex numbers [T, K / 2], scaled by wavelength as Llama 3.1's report describes."""
    rates = []
    for i in range(head_dim // 2):
        rate = params.get("rope_theta", 10000.0) ** (-2 * i / head_dim)
        if params.get("use_scaled_rope"):
            wave = 2 * torch.pi / rate
            if wave > 8192 / 1:
                rate /= params["rope_scaling_factor"]
            elif wave > 8192 / 4:
                kept = (8192 / wave - 1) / (4 - 1)
                rate = (1 - kept) * rate / params["rope_scaling_factor"] + kept * rate
        rates.append(rate)
    angles = torch.outer(torch.arange(length).double(), torch.tensor(rates, dtype=torch.float64))
    return torch.polar(torch.ones_like(angles), angles)


def meta_logits(params: dict[str, Any], weights: dict[str, Tensor], tokens_T: Tensor) -> Tensor:
    """Meta's forward pass in float64: each head's neighbouring pairs are complex numbers."""
    w = {name.removesuffix(".weight"): value.double() for name, value in weights.items()}
    n_heads, length = params["n_heads"], len(tokens_T)
    n_kv_heads = params.get("n_kv_heads", n_heads)
    head_dim = params["dim"] // n_heads
    turn = meta_rotation(params, head_dim, length)[:, None]

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return weight * x / (x.square().mean(-1, keepdim=True) + params["norm_eps"]).sqrt()

    def rotate(x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.reshape(length, -1, head_dim // 2, 2))
        return torch.view_as_real(pairs * turn).flatten(2)

    x = w["tok_embeddings"][tokens_T]
    for i in range(params["n_layers"]):
        wq, wk, wv, wo, w1, w2, w3, before, between = (w[f"layers.{i}.{n}"] for n, *_ in LAYER)
        h = norm(x, before)
        q, k = rotate(h @ wq.T), rotate(h @ wk.T)
        v = (h @ wv.T).view(length, n_kv_heads, head_dim)
        k, v = (y.repeat_interleave(n_heads // n_kv_heads, 1) for y in (k, v))
        scores = torch.einsum("thk,shk->hts", q, k) / head_dim**0.5
        scores = scores.masked_fill(torch.ones(length, length).triu(1) > 0, -torch.inf)
        x = x + torch.einsum("hts,shk->thk", scores.softmax(-1), v).flatten(1) @ wo.T
        h = norm(x, between)
        x = x + (torch.nn.functional.silu(h @ w1.T) * (h @ w3.T)) @ w2.T
    return norm(x, w["norm"]) @ w["output"].T


@given(cut=cuts(), n_files=st.integers(1, 2), shard_gb=st.sampled_from([1e-9, 2e-6, 5.0]))
def test_from_hugging_face_and_back(
    tmp_path_factory: pytest.TempPathFactory, cut: Cut, n_files: int, shard_gb: float
) -> None:
    folder, config = tmp_path_factory.mktemp("hf"), cut.config
    tensors = hf_tensors(cut)
    write_hf(folder / "a", config, tensors, n_files)
    run_convert(folder / "a", folder / "b", "--shards", cut.shards)
    params = json.loads((folder / "b" / "params.json").read_text())
    assert "max_seq_len" not in params
    run_convert(
        *(folder / "b", folder / "c", "--max-seq-len", config.max_seq_len),
        *("--max-shard-gb", shard_gb),
    )
    assert_same_bits(read_hf(folder / "c"), tensors)
    hf = json.loads((folder / "c" / "config.json").read_text())
    assert LlamaConfig.from_hf(hf) == config
    assert hf["dtype"] == str(cut.dtype).removeprefix("torch.")
    read, files = locate(folder / "c")  # the index is right, and the files are what it says
    assert read == ModelConfig.from_hf(hf)
    for path in {stored.file for stored in files.values()}:
        assert path.stat().st_size < shard_gb * 1e9 + 8000 or len(load_file(path)) == 1
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            assert metadata["format"] == "pt"
            assert json.loads(metadata["config"]) == hf


@given(cut=cuts(), axis=st.integers(0, 1), tokens_seed=seeds)
@example(
    # Long waves, which scaling reaches, and n_rep 3 beside two key/value heads.
    cut=Cut(
        LlamaConfig(
            *(60, 2, 6, 2, 10, 40, 20),
            rope_theta=5e5,
            **{"rope_factor": 32.0, **LLAMA3_SCALING},
        ),
        torch.float64,
        2,
        0,
    ),
    axis=0,
    tokens_seed=0,
)
def test_from_meta_and_back(
    tmp_path_factory: pytest.TempPathFactory, cut: Cut, axis: int, tokens_seed: int
) -> None:
    """The logits are those of Meta's equations on Meta's weights; the weights come back."""
    folder, config = tmp_path_factory.mktemp("meta"), cut.config
    params, tensors = meta_params(config), meta_tensors(cut)
    write_meta(folder / "a", params, tensors, cut.shards, axis)
    run_convert(folder / "a", folder / "b", "--max-seq-len", config.max_seq_len)
    assert len({path.stat().st_mode for path in (folder / "b").iterdir()}) == 1
    model = load_model(folder / "b", dtype=torch.float64)
    assert model.config == ModelConfig(**vars(config))
    generator = torch.Generator().manual_seed(tokens_seed)
    tokens = torch.randint(config.vocab_size, (9,), generator=generator)
    expected = meta_logits(params, tensors, tokens)
    with torch.no_grad():
        ours = model(tokens[None])[0][0]
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-10 * float(expected.abs().max()))
    run_convert(folder / "b", folder / "c", "--shards", cut.shards)
    by_rows = config.rope_theta == 5e5 or config.rope_type == "llama3"
    again, back = read_meta(folder / "c", axis=0 if by_rows else 1)
    assert_same_bits(back, tensors)
    assert torch.equal(meta_logits(again, back, tokens), expected)
    run_convert(folder / "a", folder / "d", "--to", "meta")
    assert_same_bits(read_meta(folder / "d", 0)[1], tensors)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("to", ["hf", "meta"])
def test_another_dtype_rounds_once(tmp_path: Path, to: str, dtype: str) -> None:
    params = random_params(CONFIG, 0)
    tensors = {name: torch.from_numpy(value) for name, value in params.items()}
    write_hf(tmp_path / "a", CONFIG, tensors, 1)
    run_convert(tmp_path / "a", tmp_path / "b", "--to", to, "--dtype", dtype)
    if to == "meta":
        run_convert(tmp_path / "b", tmp_path / "c")
    folder = tmp_path / ("b" if to == "hf" else "c")
    expected = {name: value.to(DTYPES[dtype]) for name, value in tensors.items()}
    assert_same_bits(read_hf(folder), expected)
    assert json.loads((folder / "config.json").read_text())["dtype"] == dtype


@pytest.mark.parametrize("shard_gb", [5.0, 1e-5])
@pytest.mark.parametrize("scaled", [False, True])
def test_transformers_computes_the_same(tmp_path: Path, scaled: bool, shard_gb: float) -> None:
    transformers = pytest.importorskip("transformers")
    scaling = {"rope_factor": 8.0, **LLAMA3_SCALING} if scaled else {}
    config = LlamaConfig(60, 2, 6, 2, 10, 40, 20, rope_theta=5e5, **scaling)
    cut = Cut(config, torch.float32, 2, 1)
    params, tensors = meta_params(config), meta_tensors(cut)
    write_meta(tmp_path / "a", params, tensors, 2)
    run_convert(tmp_path / "a", tmp_path / "b", "--max-shard-gb", shard_gb)
    assert (len(list((tmp_path / "b").glob("*.safetensors"))) == 1) == (shard_gb == 5.0)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    assert model.dtype == torch.float32
    tokens = torch.arange(12)
    with torch.no_grad():
        theirs = model(tokens[None]).logits[0]
    expected = meta_logits(params, tensors, tokens)
    torch.testing.assert_close(theirs.double(), expected, rtol=0, atol=1e-5)
