"""Model directories that transformers reads and writes, and a shard that is missing."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from llama_common.errors import InputError
from llama_torch import SamplingConfig, load
from llama_torch.checkpoint.directory_files import write_directory_files
from llama_torch.checkpoint.hf import load_model, save_model
from llama_torch.inference import engine
from llama_torch.model.config import ModelConfig
from llama_torch.model.llama import Llama

from ..support.tokenizers import byte_level

LLAMA3 = {
    "rope_type": "llama3",
    "rope_factor": 8.0,
    "rope_original_max_seq_len": 64,
    "rope_theta": 5e5,
}
SHAPES = {
    "multi-head": {"n_kv_heads": 4, "tie_embeddings": False},
    "grouped": {"n_kv_heads": 2, "tie_embeddings": False},
    "tied": {"n_kv_heads": 1, "tie_embeddings": True},
    "linear": {"rope_type": "linear", "rope_factor": 4.0},
    "llama3": LLAMA3,
}


@pytest.mark.parametrize("shape", SHAPES)
def test_transformers_continues_the_same(tmp_path: Path, shape: str) -> None:
    """Their loader, tokenizer and greedy search, ours, and the directory as either wrote it."""
    transformers = pytest.importorskip("transformers")
    ours, theirs, sharded = (tmp_path / name for name in ("ours", "theirs", "sharded"))
    ours.mkdir()
    shapes = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, **SHAPES[shape]}
    config = ModelConfig(**shapes, vocab_size=500, max_seq_len=160)
    model = Llama(config)
    model.init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():  # larger, so that no two logits are close and no token repeats itself
        for name, parameter in model.named_parameters():
            parameter.mul_(20 if "proj" in name or "lm_head" in name else 1)
    write_directory_files(ours, config)
    save_model(ours, config, model.state_dict())
    byte_level(ours)
    peer = transformers.AutoModelForCausalLM.from_pretrained(ours, dtype="float32")
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(ours)
    for folder, size in ((theirs, {}), (sharded, {"max_shard_size": "40KB"})):
        peer.save_pretrained(folder, **size)
        tokenizer.save_pretrained(folder)
    assert (sharded / "model.safetensors.index.json").is_file()
    inputs = tokenizer("Hello world, hello", return_tensors="pt", return_token_type_ids=False)
    greedy = {"max_new_tokens": 64, "do_sample": False, "pad_token_id": 0}
    expected = peer.generate(**inputs, **greedy)[0].tolist()
    for folder in (ours, theirs, sharded):
        loaded = load(folder)
        assert loaded.model.config == config
        prompt = loaded.encode("Hello world, hello")
        settings = SamplingConfig(max_new_tokens=64, temperature=0.0)
        written = list(engine.generate(loaded.model, prompt, settings))
        assert prompt + written == expected
        assert len(set(written)) > 10


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_every_precision_loads_what_transformers_saved(tmp_path: Path, dtype: str) -> None:
    transformers = pytest.importorskip("transformers")
    peer = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            vocab_size=40,
        )
    ).to(getattr(torch, dtype))
    peer.save_pretrained(tmp_path)
    model = load_model(tmp_path, dtype=torch.float64)
    for name, parameter in peer.state_dict().items():
        assert torch.equal(model.state_dict()[name], parameter.double())


def test_a_shard_that_is_missing_is_named(tmp_path: Path) -> None:
    config = ModelConfig(16, 1, 2, 1, 8, 24, 40)
    write_directory_files(tmp_path, config)
    index: dict[str, Any] = {
        "weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}
    }
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"model-00001-of-00002\.safetensors: no such file"):
        load(tmp_path)
