"""Checkpoints through both readers: every stored dtype, shards, and files that are wrong."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from safetensors.numpy import load_file

from llama_parity import random_checkpoint
from llama_torch.checkpoint.hf import load_model
from reference_np.checkpoint import Checkpoint
from reference_np.config import LlamaConfig
from reference_np.model import forward
from reference_np.ops import rope_frequencies

from ..backends.torch_model import save_numpy, torch_forward
from ..conformance.architectures import configs
from ..conformance.strategies import Params, cast, random_params
from ..support.checkpoints import CONFIG, ERRORS, write_model_file

STORED = [np.float16, ml_dtypes.bfloat16, np.float32, np.float64]
READERS = pytest.mark.parametrize("read", [Checkpoint, load_model])


def write_shards(folder: Path, params: Params, config: LlamaConfig) -> None:
    """Write the Hugging Face layout: an index, two shards, config.json."""
    names = list(params)
    weight_map = {}
    for i, part in enumerate((names[::2], names[1::2])):
        file = f"model-{i + 1:05d}-of-00002.safetensors"
        save_numpy({name: params[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config.to_hf()))


@pytest.mark.parametrize("stored", STORED, ids=lambda d: np.dtype(d).name)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_every_stored_dtype_reads_exactly(tmp_path: Path, stored: Any, dtype: Any) -> None:
    params = cast(random_params(CONFIG, 1), stored)
    save_numpy(params, tmp_path / "m.safetensors", {"config": CONFIG.to_json()})
    checkpoint = Checkpoint(tmp_path / "m.safetensors", dtype)
    assert checkpoint.config == CONFIG
    assert set(checkpoint) == set(params)
    torch_dtype = torch.float32 if dtype == np.float32 else torch.float64
    state = load_model(tmp_path / "m.safetensors", dtype=torch_dtype).state_dict()
    for name, value in params.items():
        assert checkpoint[name].dtype == dtype
        assert np.array_equal(checkpoint[name], value.astype(dtype))
        assert np.array_equal(state[name].numpy(), value.astype(dtype))


@given(config=configs())
def test_shards_read_like_one_file(
    tmp_path_factory: pytest.TempPathFactory, config: LlamaConfig
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    params = random_params(config, 2)
    write_shards(folder, params, config)
    checkpoint = Checkpoint(folder, np.float64)
    assert checkpoint.config == config
    assert all(np.array_equal(checkpoint[name], value) for name, value in params.items())
    tokens = np.arange(min(4, config.vocab_size))[None]
    ours, _ = forward(checkpoint, tokens, config)
    expected, _ = forward(params, tokens, config)
    assert np.array_equal(ours, expected)
    theirs, _, _ = torch_forward(load_model(folder, dtype=torch.float64), tokens)
    np.testing.assert_allclose(theirs, expected, rtol=0, atol=1e-9 * np.abs(expected).max())


def test_reading_is_lazy(tmp_path: Path) -> None:
    """Nothing is kept: two reads are two arrays, and the file may change in between."""
    path = write_model_file(tmp_path / "m.safetensors")
    checkpoint = Checkpoint(path)
    first = checkpoint["model.norm.weight"]
    write_model_file(path, **{"model.norm.weight": np.zeros(8, np.float32)})
    assert first.any()
    assert not checkpoint["model.norm.weight"].any()


@READERS
def test_all_wrong_tensors_are_named_at_once(tmp_path: Path, read: Callable) -> None:
    path = write_model_file(
        tmp_path / "m.safetensors",
        **{
            "model.norm.weight": None,
            "extra.weight": np.zeros(3, np.float32),
            "model.layers.1.mlp.up_proj.weight": np.zeros((8, 12), np.float32),
        },
    )
    with pytest.raises(ERRORS) as caught:
        read(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert "model.norm.weight is missing" in message
    assert "extra.weight is not a parameter" in message
    assert "model.layers.1.mlp.up_proj.weight is [8, 12] and should be [12, 8]" in message
    assert "\n" not in message


@READERS
def test_a_tied_model_may_store_its_head_twice_but_not_another(
    tmp_path: Path, read: Callable
) -> None:
    tied = LlamaConfig(8, 2, 4, 2, 4, 12, 20, tie_embeddings=True)
    embedding = random_params(tied, 0)["model.embed_tokens.weight"].astype(np.float32)
    same = write_model_file(tmp_path / "same.safetensors", tied, **{"lm_head.weight": embedding})
    read(same)
    other = write_model_file(tmp_path / "x.safetensors", tied, **{"lm_head.weight": embedding + 1})
    with pytest.raises(ERRORS, match=r"x\.safetensors: lm_head\.weight is not the embedding"):
        read(other)


@READERS
def test_derived_buffers_of_old_checkpoints_are_skipped(tmp_path: Path, read: Callable) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    read(write_model_file(tmp_path / "m.safetensors", **{name: np.ones(2, np.float32)}))


def truncated(path: Path) -> Path:
    write_model_file(path).write_bytes(path.read_bytes()[:-100])
    return path


def garbage(path: Path) -> Path:
    path.write_bytes(b"not safetensors at all" * 10)
    return path


def without_config(path: Path) -> Path:
    save_numpy(load_file(write_model_file(path)), path)
    return path


def broken_metadata(path: Path) -> Path:
    save_numpy(load_file(write_model_file(path)), path, {"config": "{"})
    return path


def contradicting_config(path: Path) -> Path:
    hf = CONFIG.to_hf() | {"rope_theta": 5e5}
    (path.parent / "config.json").write_text(json.dumps(hf))
    return write_model_file(path)


def config_of_another_size(path: Path) -> Path:
    save_numpy(load_file(write_model_file(path)), path)
    hf = CONFIG.to_hf() | {"num_hidden_layers": 3}
    (path.parent / "config.json").write_text(json.dumps(hf))
    return path


def missing_shard(path: Path) -> Path:
    write_shards(path.parent, cast(random_params(CONFIG, 0), np.float32), CONFIG)
    (path.parent / "model-00002-of-00002.safetensors").unlink()
    return path.parent


def integer_tensor(path: Path) -> Path:
    return write_model_file(path, **{"model.norm.weight": np.ones(8, np.int64)})


def index_of_numbers(path: Path) -> Path:
    (path.parent / "model.safetensors.index.json").write_text('{"weight_map": {"a": 3}}')
    return path.parent


def index_outside_its_folder(path: Path) -> Path:
    text = '{"weight_map": {"a": "../m.safetensors"}}'
    (path.parent / "model.safetensors.index.json").write_text(text)
    return path.parent


def empty_index(path: Path) -> Path:
    (path.parent / "model.safetensors.index.json").write_text("{}")
    return path.parent


@READERS
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path, "no such file"),
        (lambda path: path.parent, "no such file"),
        (truncated, "not a complete safetensors file"),
        (garbage, "not a complete safetensors file"),
        (without_config, "config.json: no such file"),
        (broken_metadata, "metadata"),
        (contradicting_config, "contradicts the config"),
        (config_of_another_size, "model.layers.2.self_attn.k_proj.weight is missing; 6 more are"),
        (missing_shard, "model-00002-of-00002.safetensors: no such file"),
        (empty_index, "has no weight_map"),
        (index_of_numbers, "3 is not the name of a file"),
        (index_outside_its_folder, "is not the name of a file beside it"),
        (integer_tensor, "model.norm.weight is stored as I64"),
    ],
)
def test_wrong_files_are_one_clear_line(
    tmp_path: Path, read: Callable, make: Callable[[Path], Path], message: str
) -> None:
    with pytest.raises(ERRORS, match=message) as caught:
        read(make(tmp_path / "m.safetensors"))
    assert "\n" not in str(caught.value)


def test_the_oracle_computes_in_two_dtypes_only(tmp_path: Path) -> None:
    with pytest.raises(ERRORS, match="float16"):
        Checkpoint(write_model_file(tmp_path / "m.safetensors"), np.float16)


def test_a_model_file_has_the_permissions_of_any_other(tmp_path: Path) -> None:
    random_checkpoint.write(tmp_path, LlamaConfig(16, 1, 4, 2, 4, 24, 60), "float32", seed=0)
    (tmp_path / "other").touch()
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1


def test_a_random_checkpoint_is_one_that_both_sides_read(tmp_path: Path) -> None:
    config = LlamaConfig(16, 3, 4, 2, 4, 24, 60)
    random_checkpoint.write(tmp_path, config, "bfloat16", seed=0)
    assert len(list(tmp_path.glob("*.safetensors"))) == 4  # three layers and the rest
    params = Checkpoint(tmp_path)
    model = load_model(tmp_path)
    for name, value in model.state_dict().items():
        assert np.array_equal(params[name], value.numpy())
    assert 0.015 < params["model.layers.1.mlp.up_proj.weight"].std() < 0.025
    code = random_checkpoint.main([str(tmp_path)])
    assert code == 2  # it holds a model already


@pytest.mark.filterwarnings("ignore")  # transformers' own
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_transformers_loads_a_random_checkpoint_in_its_precision(
    tmp_path: Path, dtype: str
) -> None:
    transformers = pytest.importorskip("transformers")
    random_checkpoint.write(tmp_path, LlamaConfig(16, 2, 4, 2, 4, 24, 60), dtype, seed=0)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert {str(x.dtype) for x in model.parameters()} == {f"torch.{dtype}"}
    stored = sum(x.numel() * x.element_size() for x in model.parameters())
    assert index["metadata"]["total_size"] == stored
    ours = load_model(tmp_path).state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(value.float(), ours[name])


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("rope_type", ["default", "linear", "llama3"])
def test_a_tiny_random_checkpoint_has_what_its_flags_say(
    tmp_path: Path, rope_type: str, tied: bool
) -> None:
    flags = ["--shape", "tiny", "--head-dim", "24", "--n-kv-heads", "2", "--rope-type", rope_type]
    assert random_checkpoint.main([str(tmp_path / "m"), *flags, *["--tied"] * tied]) == 0
    assert sum(path.stat().st_size for path in (tmp_path / "m").iterdir()) < 2e6
    params = Checkpoint(tmp_path / "m")
    config = params.config
    assert (config.head_dim, config.n_kv_heads, config.tie_embeddings) == (24, 2, tied)
    assert config.rope_type == rope_type
    scales = rope_frequencies(config) / rope_frequencies(replace(config, rope_type="default"))
    kinds = len(np.unique(scales.round(6)))
    assert kinds > 2 if rope_type == "llama3" else kinds == 1  # left, mixed and divided
    assert (scales.min() < 1) == (rope_type != "default")
    load_model(tmp_path / "m")
    # Activations stay near one, and no parameter is a default that would hide a bug.
    assert 0.2 < params["model.norm.weight"].std() < 0.4
