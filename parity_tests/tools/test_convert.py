"""convert.py: bits that come back, logits that Meta's own equations give, and bad input."""

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from llama_torch.checkpoint.hf import load_model, locate
from llama_torch.model.config import ModelConfig
from reference_np.config import LlamaConfig
from tools import convert
from tools.conversion.meta_params import config_from, hidden_width, params_of

from ..conformance.strategies import random_params, seeds

ROOT = Path(__file__).parent.parent.parent
DTYPES = {t: getattr(torch, t) for t in ("float64", "float32", "bfloat16", "float16")}
LLAMA3_SCALING = {
    "rope_type": "llama3",
    "rope_low_freq_factor": 1.0,
    "rope_high_freq_factor": 4.0,
    "rope_original_max_seq_len": 8192,
}
# Of each layer: Meta's name, rows, columns, the axis that model parallelism cuts.
LAYER = (
    ("attention.wq", "dim", "dim", 0),
    ("attention.wk", "keys", "dim", 0),
    ("attention.wv", "keys", "dim", 0),
    ("attention.wo", "dim", "dim", 1),
    ("feed_forward.w1", "hidden", "dim", 0),
    ("feed_forward.w2", "dim", "hidden", 1),
    ("feed_forward.w3", "hidden", "dim", 0),
    ("attention_norm", "dim", None, None),
    ("ffn_norm", "dim", None, None),
)


class Cut(NamedTuple):
    """A config that Meta's form can express, the dtype to store and the number of files."""

    config: LlamaConfig
    dtype: torch.dtype
    shards: int
    seed: int


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


def write_hf(folder: Path, config: LlamaConfig, tensors: dict[str, Tensor], n_files: int) -> Path:
    folder.mkdir()
    names, weight_map = list(tensors), {}
    for i in range(n_files):
        file = f"model-{i + 1:05}-of-{n_files:05}.safetensors"
        save_file({name: tensors[name] for name in names[i::n_files]}, folder / file)
        weight_map |= dict.fromkeys(names[i::n_files], file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config.to_hf()))
    return folder


def read_hf(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the folder's safetensors files, by the library alone."""
    tensors: dict[str, Tensor] = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
    return tensors


def meta_axes(n_layers: int, embedding_axis: int) -> dict[str, int | None]:
    axes: dict[str, int | None] = {"tok_embeddings.weight": embedding_axis}
    for i in range(n_layers):
        axes |= {f"layers.{i}.{name}.weight": axis for name, _, _, axis in LAYER}
    return axes | {"norm.weight": None, "output.weight": 0}


def meta_tensors(cut: Cut) -> dict[str, Tensor]:
    """Whole weights by Meta's names, drawn here: the converter has had no part in them."""
    config = cut.config
    sizes = {"dim": config.dim, "hidden": config.hidden_dim}
    sizes["keys"] = config.n_kv_heads * config.dim // config.n_heads
    generator = torch.Generator().manual_seed(cut.seed)

    def drawn(*shape: int) -> Tensor:
        value = torch.randn(shape, dtype=torch.float64, generator=generator)
        value = 1 + 0.3 * value if len(shape) == 1 else value / shape[1] ** 0.5
        return value.to(cut.dtype)

    tensors = {"tok_embeddings.weight": drawn(config.vocab_size, config.dim)}
    for i in range(config.n_layers):
        for name, rows, columns, _ in LAYER:
            shape = (sizes[rows],) if columns is None else (sizes[rows], sizes[columns])
            tensors[f"layers.{i}.{name}.weight"] = drawn(*shape)
    tensors["norm.weight"] = drawn(config.dim)
    tied = config.tie_embeddings
    tensors["output.weight"] = (
        tensors["tok_embeddings.weight"].clone() if tied else drawn(config.vocab_size, config.dim)
    )
    return tensors


def meta_params(config: LlamaConfig) -> dict[str, Any]:
    """params.json as released: vocab_size -1, the feed-forward width by Meta's rule."""
    params = {"dim": config.dim, "n_layers": config.n_layers, "n_heads": config.n_heads}
    params |= {"n_kv_heads": config.n_kv_heads, "norm_eps": config.norm_eps, "vocab_size": -1}
    params |= {"multiple_of": 1, "rope_theta": config.rope_theta}
    params["ffn_dim_multiplier"] = (config.hidden_dim + 0.25) / int(8 * config.dim / 3)
    if config.rope_type == "llama3":
        params |= {"use_scaled_rope": True, "rope_scaling_factor": config.rope_factor}
    return params


def write_meta(
    folder: Path, params: dict[str, Any], tensors: dict[str, Tensor], shards: int, axis: int = 1
) -> Path:
    folder.mkdir()
    axes = meta_axes(params["n_layers"], axis)
    for i in range(shards):
        part = {"rope.freqs": torch.ones(2)}
        for name, value in tensors.items():
            if (cut_axis := axes.get(name)) is not None:
                # Not contiguous where columns are cut, and stored so.
                value = value.tensor_split(shards, cut_axis)[i]
            part[name] = value
        torch.save(part, folder / f"consolidated.{i:02}.pth")
    (folder / "params.json").write_text(json.dumps(params))
    return folder


def read_meta(folder: Path, axis: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """params.json and the whole tensors, joined here along the axes that Meta's loaders assume."""
    params = json.loads((folder / "params.json").read_text())
    parts = [torch.load(path) for path in sorted(folder.glob("*.pth"))]
    axes = meta_axes(params["n_layers"], axis)
    assert all(part.keys() == axes.keys() for part in parts)
    for name in (name for name, axis in axes.items() if axis is None):
        assert all(bits(part[name]) == bits(parts[0][name]) for part in parts)
    return params, {
        name: parts[0][name] if axis is None else torch.cat([part[name] for part in parts], axis)
        for name, axis in axes.items()
    }


def bits(tensor: Tensor) -> tuple[Any, ...]:
    raw = tensor.detach().contiguous().view(torch.uint8)
    return tensor.dtype, tensor.shape, raw.numpy().tobytes()


def assert_same_bits(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert bits(value) == bits(right[name]), name


def run(*argv: object) -> None:
    assert convert.main([str(word) for word in argv]) == 0


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
    run(folder / "a", folder / "b", "--shards", cut.shards)
    params = json.loads((folder / "b" / "params.json").read_text())
    assert "max_seq_len" not in params
    run(
        *(folder / "b", folder / "c", "--max-seq-len", config.max_seq_len),
        *("--max-shard-gb", shard_gb),
    )
    assert_same_bits(read_hf(folder / "c"), tensors)
    hf = json.loads((folder / "c" / "config.json").read_text())
    assert LlamaConfig.from_hf(hf) == config
    assert hf["dtype"] == str(cut.dtype).removeprefix("torch.")
    read, files = locate(folder / "c")  # the index is right, and the files are what it says
    assert read == ModelConfig.from_hf(hf)
    for path, _ in files.values():
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
    run(folder / "a", folder / "b", "--max-seq-len", config.max_seq_len)
    assert len({path.stat().st_mode for path in (folder / "b").iterdir()}) == 1
    model = load_model(folder / "b", dtype=torch.float64)
    assert model.config == ModelConfig(**vars(config))
    generator = torch.Generator().manual_seed(tokens_seed)
    tokens = torch.randint(config.vocab_size, (9,), generator=generator)
    expected = meta_logits(params, tensors, tokens)
    with torch.no_grad():
        ours = model(tokens[None])[0][0]
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-10 * float(expected.abs().max()))
    run(folder / "b", folder / "c", "--shards", cut.shards)
    by_rows = config.rope_theta == 5e5 or config.rope_type == "llama3"
    again, back = read_meta(folder / "c", axis=0 if by_rows else 1)
    assert_same_bits(back, tensors)
    assert torch.equal(meta_logits(again, back, tokens), expected)
    run(folder / "a", folder / "d", "--to", "meta")
    assert_same_bits(read_meta(folder / "d", 0)[1], tensors)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("to", ["hf", "meta"])
def test_another_dtype_rounds_once(tmp_path: Path, to: str, dtype: str) -> None:
    params = random_params(CONFIG, 0)
    tensors = {name: torch.from_numpy(value) for name, value in params.items()}
    write_hf(tmp_path / "a", CONFIG, tensors, 1)
    run(tmp_path / "a", tmp_path / "b", "--to", to, "--dtype", dtype)
    if to == "meta":
        run(tmp_path / "b", tmp_path / "c")
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
    run(tmp_path / "a", tmp_path / "b", "--max-shard-gb", shard_gb)
    assert (len(list((tmp_path / "b").glob("*.safetensors"))) == 1) == (shard_gb == 5.0)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    assert model.dtype == torch.float32
    tokens = torch.arange(12)
    with torch.no_grad():
        theirs = model(tokens[None]).logits[0]
    expected = meta_logits(params, tensors, tokens)
    torch.testing.assert_close(theirs.double(), expected, rtol=0, atol=1e-5)


CONFIG = LlamaConfig(24, 2, 6, 2, 4, 40, 30)
CUT = Cut(CONFIG, torch.float32, 2, 0)


def a_meta(folder: Path, shards: int = 2, **params: object) -> Path:
    """Write a small Meta checkpoint, some keys of its params.json changed or (None) left out."""
    changed = meta_params(CONFIG) | {"ffn_dim_multiplier": 0.63, "multiple_of": 8} | params
    changed = {key: value for key, value in changed.items() if value is not None}
    write_meta(folder, meta_params(CONFIG), meta_tensors(CUT), shards)
    (folder / "params.json").write_text(json.dumps(changed))
    return folder


def an_hf(folder: Path, config: LlamaConfig = CONFIG) -> Path:
    tensors = {n: torch.from_numpy(v).float() for n, v in random_params(config, 0).items()}
    return write_hf(folder, config, tensors, 1)


def changed_part(folder: Path, change: Callable[[dict[str, Any]], object], shards: int = 2) -> Path:
    """Write a Meta checkpoint with its last file changed."""
    path = a_meta(folder, shards) / f"consolidated.{shards - 1:02}.pth"
    part = torch.load(path)
    change(part)
    torch.save(part, path)
    return folder


def test_what_surrounds_the_weights_comes_along(tmp_path: Path) -> None:
    an_hf(tmp_path / "a")
    hf = CONFIG.to_hf() | {"bos_token_id": 1, "eos_token_id": [2, 3], "use_cache": True}
    (tmp_path / "a" / "config.json").write_text(json.dumps(hf))
    names = ("tokenizer.model", "tokenizer.json", "chat_template.jinja")
    for name in names:
        (tmp_path / "a" / name).write_bytes(os.urandom(20))
    run(tmp_path / "a", tmp_path / "b")
    run(tmp_path / "b", tmp_path / "c")
    run(tmp_path / "a", tmp_path / "d", "--to", "hf")
    for folder in "bcd":
        for name in names:
            copied = tmp_path / folder / name
            assert copied.read_bytes() == (tmp_path / "a" / name).read_bytes()
    for folder in "cd":
        written = json.loads((tmp_path / folder / "config.json").read_text())
        assert (written["bos_token_id"], written["eos_token_id"]) == (1, [2, 3])
        assert "pad_token_id" not in written


def test_one_file_that_carries_its_config(tmp_path: Path) -> None:
    tensors = {name: torch.from_numpy(value) for name, value in random_params(CONFIG, 0).items()}
    save_file(tensors, tmp_path / "m.safetensors", {"config": CONFIG.to_json()})
    (tmp_path / "empty").mkdir()
    run(tmp_path / "m.safetensors", tmp_path / "empty")
    run(tmp_path / "empty", tmp_path / "b", "--max-seq-len", CONFIG.max_seq_len)
    assert_same_bits(read_hf(tmp_path / "b"), tensors)


def test_what_the_files_of_other_years_hold(tmp_path: Path) -> None:
    """Parameters, transposed memory, and the format from before archives."""
    tensors = meta_tensors(CUT)
    odd = {name: torch.nn.Parameter(value.t().contiguous().t()) for name, value in tensors.items()}
    a_meta(tmp_path / "a", 1)
    path = tmp_path / "a" / "consolidated.00.pth"
    for archive in (False, True):
        torch.save(odd, path, _use_new_zipfile_serialization=archive)
        run(tmp_path / "a", tmp_path / f"b{archive}", "--to", "meta")
        assert_same_bits(read_meta(tmp_path / f"b{archive}", 1)[1], tensors)


def test_matrices_that_share_their_memory(tmp_path: Path) -> None:
    one, other = (f"layers.{i}.feed_forward.w1.weight" for i in range(2))
    tensors = meta_tensors(CUT)
    tensors[other] = tensors[one]
    write_meta(tmp_path / "a", meta_params(CONFIG), tensors, 1)
    run(tmp_path / "a", tmp_path / "b")
    written = read_hf(tmp_path / "b")
    for i in range(2):
        assert bits(written[f"model.layers.{i}.mlp.gate_proj.weight"]) == bits(tensors[one])


def test_views_are_stored_without_what_they_are_views_of(tmp_path: Path) -> None:
    an_hf(tmp_path / "a")
    for shards in (1, 2):
        run(tmp_path / "a", tmp_path / f"b{shards}", "--shards", shards)
    whole = (tmp_path / "b1" / "consolidated.00.pth").stat().st_size
    assert (tmp_path / "b2" / "consolidated.01.pth").stat().st_size < 0.65 * whole


@pytest.mark.parametrize("different", [-0.0, 1.0])
def test_only_equal_bits_are_tied(tmp_path: Path, different: float) -> None:
    tensors = meta_tensors(CUT)
    tensors["tok_embeddings.weight"][3, 3] = 0.0
    tensors["output.weight"] = tensors["tok_embeddings.weight"].clone()
    write_meta(tmp_path / "a", meta_params(CONFIG), tensors, 1)
    run(tmp_path / "a", tmp_path / "tied")
    assert "lm_head.weight" not in read_hf(tmp_path / "tied")
    tensors["output.weight"][3, 3] = different
    write_meta(tmp_path / "b", meta_params(CONFIG), tensors, 1)
    run(tmp_path / "b", tmp_path / "untied")
    written = read_hf(tmp_path / "untied")["lm_head.weight"]
    assert bits(written) == bits(tensors["output.weight"])


@pytest.mark.parametrize(
    ("flags", "params", "length"),
    [
        ((), {"rope_theta": None}, 4096),
        ((), {"rope_theta": 1e6}, 4096),
        ((), {"rope_theta": 5e5}, 8192),
        ((), {"use_scaled_rope": True, "rope_scaling_factor": 8}, 131072),
        (("--rope-scaling-factor", 32), {"use_scaled_rope": True}, 131072),
        (("--max-seq-len", 77), {"rope_theta": 5e5, "max_seq_len": 3, "lora_args": None}, 77),
    ],
)
def test_the_context_that_params_json_lacks(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    flags: tuple[object, ...],
    params: dict[str, Any],
    length: int,
) -> None:
    run(a_meta(tmp_path / "a", **params), tmp_path / "b", *flags)
    config, _ = locate(tmp_path / "b")
    assert config.max_seq_len == length
    assert config.rope_theta == (params.get("rope_theta", 1e4) or 1e4)
    assert config.rope_factor == (flags or (0, 8))[1] or not params.get("use_scaled_rope")
    assert f"{length}, assumed" in capsys.readouterr().out or "--max-seq-len" in flags


@pytest.mark.parametrize(
    ("dim", "multiple_of", "multiplier", "width"),
    [  # as released: Llama 2 7B, 13B, 70B, Llama 3 8B, Llama 3.2 1B
        (4096, 256, None, 11008),
        (5120, 256, None, 13824),
        (8192, 4096, 1.3, 28672),
        (4096, 1024, 1.3, 14336),
        (2048, 256, 1.5, 8192),
    ],
)
def test_the_feed_forward_width_of_released_models(
    dim: int, multiple_of: int, multiplier: float | None, width: int
) -> None:
    assert hidden_width(dim, multiple_of, multiplier) == width
    params = params_of(ModelConfig(dim, 1, 8, 8, 0, width))
    assert params.get("multiple_of") == 256
    assert ("ffn_dim_multiplier" in params) == (multiplier is not None)


@given(dim=st.integers(1, 20_000), hidden=st.integers(1, 200_000))
@example(dim=4, hidden=51)  # 51 / 21 * 21 is below 51 in floating point
def test_any_feed_forward_width_can_be_said(dim: int, hidden: int) -> None:
    params = params_of(ModelConfig(2 * dim, 1, 1, 1, 0, hidden))
    # Meta's own lines, not the converter's.
    width = int(2 * (4 * params["dim"]) / 3)
    if params.get("ffn_dim_multiplier") is not None:
        width = int(params["ffn_dim_multiplier"] * width)
    multiple = params["multiple_of"]
    assert multiple * ((width + multiple - 1) // multiple) == hidden


@given(
    heads=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    sizes=st.tuples(st.integers(1, 9), st.integers(1, 400), st.integers(1, 400)),
    norm_eps=st.floats(1e-12, 1e-2),
    rope_theta=st.floats(1e-3, 1e9),
    factor=st.floats(0.125, 64),
    scaled=st.booleans(),
)
@example((1, 1), (4, 2, 5), 1e-5, 9999.0, 1.0, False)
@example((1, 2), (4, 2, 5), 1e-6, 500.0, 1.0, True)
@example((2, 2), (4, 2, 5), 1e-6, 10000.5, 0.5, True)
def test_params_json_says_every_number_of_a_config(
    heads: tuple[int, int],
    sizes: tuple[int, int, int],
    norm_eps: float,
    rope_theta: float,
    factor: float,
    scaled: bool,
) -> None:
    """Whatever lies on either side of what params.json leaves out comes back as it was."""
    n_kv_heads, n_rep = heads
    head_dim, hidden_dim, vocab_size = sizes
    config = ModelConfig(
        *(2 * head_dim * n_kv_heads * n_rep, 3, n_kv_heads * n_rep, n_kv_heads),
        *(0, hidden_dim, vocab_size, 77, norm_eps, rope_theta, False),
        **({"rope_factor": factor, **LLAMA3_SCALING} if scaled else {}),
    )
    params = json.loads(json.dumps(params_of(config)))
    assert config_from(params, Path("params.json"), 77, 0) == config


class Code:
    """Unpickled, it makes a directory."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("archive", [True, False])
def test_a_file_with_code_is_refused_and_the_code_not_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], archive: bool
) -> None:
    path = a_meta(tmp_path / "a", 1) / "consolidated.00.pth"
    content = torch.load(path) | {"more": Code(tmp_path / "ran")}
    torch.save(content, path, _use_new_zipfile_serialization=archive)
    assert convert.main([str(path.parent), str(tmp_path / "b")]) == 2
    assert "consolidated.00.pth: loading it would run code (posix.mkdir)" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "b").exists()
    torch.load(path, weights_only=False)
    assert (tmp_path / "ran").exists()  # so that the above could have failed


def without(*names: str) -> Callable[[Path], Path]:
    """Write a Meta checkpoint without some of its files."""

    def make(folder: Path) -> Path:
        a_meta(folder, 2)
        for name in names:
            (folder / name).unlink()
        return folder

    return make


def with_bytes(name: str, edit: Callable[[bytes], bytes]) -> Callable[[Path], Path]:
    """Write a Meta checkpoint with one file's bytes edited."""

    def make(folder: Path) -> Path:
        path = a_meta(folder, 2) / name
        path.write_bytes(edit(path.read_bytes()))
        return folder

    return make


def old_format_cut(folder: Path) -> Path:
    path = a_meta(folder, 1) / "consolidated.00.pth"
    torch.save(torch.load(path), path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[:-100])
    return folder


def gap(folder: Path) -> Path:
    a_meta(folder, 2)
    (folder / "consolidated.01.pth").rename(folder / "consolidated.02.pth")
    return folder


def both(folder: Path) -> Path:
    return (an_hf(a_meta(folder) / "x") / "config.json").rename(folder / "config.json") and (
        (folder / "x" / "model.safetensors.index.json").rename(
            folder / "model.safetensors.index.json"
        )
        and folder
    )


def hf_with(**changes: Any) -> Callable[[Path], Path]:
    fields = {**vars(CONFIG), **changes}
    return lambda folder: an_hf(folder, LlamaConfig(**fields))


def large(folder: Path) -> Path:
    tensors = {n: torch.from_numpy(v) * 1e5 for n, v in random_params(CONFIG, 0).items()}
    return write_hf(folder, CONFIG, tensors, 1)


def meta(**params: object) -> Callable[[Path], Path]:
    return lambda folder: a_meta(folder, 2, **params)


def part(change: Callable[[dict[str, Any]], object], shards: int = 2) -> Callable[[Path], Path]:
    return lambda folder: changed_part(folder, change, shards)


def add_one(name: str) -> Callable[[dict[str, Any]], object]:
    return lambda tensors: tensors[name].add_(1)


BAD: list[tuple[Callable[[Path], Path], str, list[str]]] = [
    # params.json
    (without("params.json"), "", ["params.json: no such file"]),
    (with_bytes("params.json", lambda raw: raw[:-1]), "", ["params.json: is not JSON"]),
    (with_bytes("params.json", lambda raw: b"[]"), "", ["params.json: is not a JSON object"]),
    (meta(dim=None, norm_eps=None), "", ["dim is missing", "norm_eps is missing"]),
    (meta(qk_norm=True, moe_args={}), "", ["qk_norm=True", "moe_args={}", "unknown"]),
    (meta(dim="24"), "", ["dim='24'", "positive int"]),
    (meta(dim=24.0), "", ["dim=24.0", "positive int"]),
    (meta(n_layers=0), "", ["n_layers=0"]),
    (meta(norm_eps=float("nan")), "", ["norm_eps=nan", "positive float"]),
    (meta(rope_theta=10**400), "", ["rope_theta=1000"]),
    (meta(use_scaled_rope=1), "", ["use_scaled_rope=1", "true or false"]),
    (meta(n_heads=5), "", ["params.json: dim", "multiple of n_heads 5"]),
    (meta(n_kv_heads=4), "", ["params.json: n_heads", "multiple of n_kv_heads 4"]),
    (meta(ffn_dim_multiplier=1e-9), "", ["hidden_dim must be positive"]),
    (meta(rope_scaling_factor=8), "", ["rope_scaling_factor without use_scaled_rope"]),
    (meta(use_scaled_rope=True), "", ["--rope-scaling-factor", "8 for Llama 3.1", "32 for"]),
    (
        meta(use_scaled_rope=True, rope_scaling_factor=8),
        "--rope-scaling-factor 32",
        ["--rope-scaling-factor 32", "rope_scaling_factor=8"],
    ),
    (meta(), "--rope-scaling-factor 8", ["--rope-scaling-factor 8.0", "no use_scaled_rope"]),
    # params.json against the weights
    (
        meta(n_layers=3, multiple_of=16, vocab_size=32, n_kv_heads=6),
        "",
        [
            "n_layers is 3, theirs 2",
            "hidden width is 48, theirs 40",
            "vocab_size is 32, theirs 30",
            "n_kv_heads * dim / n_heads is 24, theirs 8",
        ],
    ),
    (meta(n_layers=1), "", ["n_layers is 1, theirs 2"]),
    (meta(dim=48, ffn_dim_multiplier=None), "", ["dim is 48, theirs 24"]),
    (without("consolidated.01.pth"), "", ["hidden width is 40, theirs 20", "are missing"]),
    (part(lambda t: t.pop("norm.weight"), 1), "", ["norm.weight is missing"]),
    (part(lambda t: t.pop("tok_embeddings.weight"), 1), "", ["tok_embeddings.weight is missing"]),
    (
        part(lambda t: t.update({"bias": torch.ones(3), "layers.1.x": torch.tensor(1.0)}), 1),
        "",
        ["bias is not a parameter", "layers.1.x is not a parameter"],
    ),
    (
        part(lambda t: t.update({"tok_embeddings.weight": torch.tensor(1.0)}), 1),
        "",
        ["tok_embeddings.weight is [] and should be [1, 24]"],
    ),
    # the files against each other
    (gap, "", ["consolidated.02.pth but not consolidated.01.pth"]),
    (part(add_one("norm.weight")), "", ["consolidated.01.pth", "norm.weight", "another check"]),
    (part(add_one("layers.1.ffn_norm.weight")), "", ["layers.1.ffn_norm.weight", "another"]),
    (part(lambda t: t.pop("output.weight")), "", ["output.weight", "another checkpoint"]),
    (
        part(lambda t: t.update({"output.weight": t["output.weight"].half()})),
        "",
        ["output.weight", "another checkpoint"],
    ),
    # a file itself
    (with_bytes("consolidated.01.pth", lambda raw: raw[:-99]), "", ["01.pth: not a complete"]),
    (with_bytes("consolidated.01.pth", lambda raw: raw[:500]), "", ["01.pth: not a complete"]),
    (with_bytes("consolidated.00.pth", lambda raw: b""), "", ["00.pth: not a complete"]),
    (with_bytes("consolidated.00.pth", lambda raw: b"text" * 99), "", ["00.pth: not a complete"]),
    (old_format_cut, "", ["00.pth: not a complete"]),
    (part(lambda t: t.clear()), "", ["01.pth: holds no tensors"]),
    (part(lambda t: t.update({"epoch": 3})), "", ["01.pth: epoch is no float tensor"]),
    (part(lambda t: t.update({4: torch.ones(1)})), "", ["01.pth: 4 is no float tensor"]),
    (
        part(lambda t: t.update({"norm.weight": torch.ones(24, dtype=torch.int8)})),
        "",
        ["norm.weight is no float tensor"],
    ),
    # the source
    (lambda folder: folder, "", ["no such file"]),
    (lambda folder: folder.mkdir() or folder, "", ["neither model.safetensors nor consolidated"]),
    (both, "", ["both model.safetensors and consolidated"]),
    (lambda folder: a_meta(folder) / "consolidated.00.pth", "", ["give the directory"]),
    (lambda folder: an_hf(folder) / "config.json", "", ["not a complete safetensors file"]),
    # what Meta's code cannot express
    (
        hf_with(head_dim=8, rope_type="linear", rope_factor=2.0),
        "--shards 7",
        ["head_dim 8", "linear", "divide n_heads 6", "n_kv_heads 2", "vocab_size 30", "dim 24"],
    ),
    (
        hf_with(**LLAMA3_SCALING | {"rope_low_freq_factor": 2.0, "rope_factor": 8.0}),
        "",
        ["rope_low_freq_factor 2.0", "1.0"],
    ),
    (
        hf_with(**LLAMA3_SCALING | {"rope_original_max_seq_len": 99, "rope_factor": 8.0}),
        "",
        ["rope_original_max_seq_len 99", "8192"],
    ),
    # flags
    (an_hf, "--shards 0", ["--shards must lie between 1 and 99"]),
    (an_hf, "--max-shard-gb 0", ["--max-shard-gb must be positive"]),
    (an_hf, "--max-seq-len -1", ["--max-seq-len must"]),
    (an_hf, "--rope-scaling-factor nan", ["--rope-scaling-factor must"]),
    (an_hf, "--to onnx", ["--to"]),
    (an_hf, "--to hf --shards 2", ["--shards", "use --max-shard-gb"]),
    (an_hf, "--max-shard-gb 2", ["--max-shard-gb", "use --shards"]),
    (an_hf, "--max-seq-len 9", ["--max-seq-len", "config.json"]),
    (an_hf, "--rope-scaling-factor 8", ["--rope-scaling-factor", "config.json"]),
    (large, "--dtype float16", ["too large for --dtype float16"]),
    (large, "--dtype float16 --to hf", ["too large for --dtype float16"]),
]


@pytest.mark.parametrize(("make", "flags", "words"), BAD, ids=[words[0] for *_, words in BAD])
def test_bad_input_is_one_line_and_leaves_nothing(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    make: Callable[[Path], Path],
    flags: str,
    words: list[str],
) -> None:
    source = make(tmp_path / "a")
    before = sorted(tmp_path.iterdir())
    code = convert.main([str(source), str(tmp_path / "b"), *flags.split()])
    error = capsys.readouterr().err
    assert code == 2
    assert error.count("\n") == 1
    assert "Traceback" not in error
    for word in words:
        assert word in error
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("a", "lies in"),
        ("a/inside", "lies in"),
        ("a/../a/b/c", "lies in"),
        ("full", "exists already"),
        ("file", "exists already"),
        ("no/where", "there is no directory"),
    ],
)
def test_a_bad_target_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], target: str, words: str
) -> None:
    an_hf(tmp_path / "a")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    assert convert.main([str(tmp_path / "a"), str(tmp_path / target)]) == 2
    assert words in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("to", ["hf", "meta"])
def test_a_full_disk_is_one_line_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], to: str
) -> None:
    an_hf(tmp_path / "a")
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))
    try:
        code = convert.main([str(tmp_path / "a"), str(tmp_path / "b"), "--to", to])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    error = capsys.readouterr().err
    assert code == 2
    assert error.count("\n") == 1
    assert "cannot be written" in error
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_an_interrupted_conversion_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    an_hf(tmp_path / "a")
    monkeypatch.setattr(torch, "save", interrupted)
    assert convert.main([str(tmp_path / "a"), str(tmp_path / "b")]) == 130
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_it_runs_as_a_script(tmp_path: Path) -> None:
    an_hf(tmp_path / "a")
    command = [sys.executable, "tools/convert.py", tmp_path / "a", tmp_path / "b"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "--max-seq-len" in done.stdout
