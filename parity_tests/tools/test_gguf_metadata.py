"""Metadata of an odd type or value: one line that names the file and the key, or the same model."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llama_common.errors import InputError
from llama_parity import convert
from llama_parity.conversion.gguf_checkpoint import GgufCheckpoint
from llama_parity.conversion.gguf_vocabulary import token_ids_of, tokenizer_files
from reference_np.config import LlamaConfig

from ..conformance.strategies import random_params
from ..support import tokenizers as made
from ..support.meta_checkpoints import write_hf
from .commands import run_convert
from .gguf_files import ChangedKeys, write_as_llama_cpp

gguf = pytest.importorskip("gguf")

SCALED = {"rope_type": "llama3", "rope_factor": 8.0, "rope_original_max_seq_len": 8192}
CONFIG = LlamaConfig(8, 2, 2, 1, 4, 4, 405, max_seq_len=64, rope_theta=5e5, **SCALED)
# Keys that no file here has, beside those that these have.
OTHERS = (
    *("split.count", "split.no", "llama.expert_count", "llama.logit_scale", "general.alignment"),
    *("llama.rope.scaling.type", "llama.rope.scaling.factor", "llama.rope.scale_linear"),
    "llama.rope.scaling.original_context_length",
    *("tokenizer.ggml.padding_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.merges"),
)
ODD = (
    *(0, 3, -1, 2.0, math.nan, math.inf, True, "", "x", "false", []),
    *([0, 0], [1], [1, 2], [0.5], [math.nan], [True], ["a"], ["a", "b"]),
)


@pytest.fixture(scope="module", params=["llama.cpp's", "pieces", "bytes"])
def a_file(request: pytest.FixtureRequest, tmp_path_factory: Any) -> ChangedKeys:
    """A file as llama.cpp's converter writes it, or ours with a tokenizer."""
    folder = tmp_path_factory.mktemp("gguf")
    if request.param == "llama.cpp's":
        path = write_as_llama_cpp(folder / "b.gguf", CONFIG, random_params(CONFIG, 0))
        return ChangedKeys(path)
    vocab_size = {"pieces": 405, "bytes": 510}[request.param]
    config = LlamaConfig(8, 2, 2, 1, 4, 4, vocab_size, max_seq_len=64)
    tensors = {n: torch.from_numpy(x).float() for n, x in random_params(config, 0).items()}
    write_hf(folder / "a", config, tensors, 1)
    made.KINDS[request.param](folder / "a")
    run_convert(folder / "a", folder / "b.gguf")
    return ChangedKeys(folder / "b.gguf")


@pytest.mark.parametrize("value", ODD, ids=repr)
def test_each_key_of_any_type_is_read_or_refused_by_name(
    a_file: ChangedKeys, tmp_path: Path, value: Any
) -> None:
    path = a_file.write(tmp_path / "m.gguf", {})
    whole = dict(GgufCheckpoint(path))
    messages = {}
    for key in (*a_file.fields, *OTHERS):
        a_file.write(path, {key: value})
        try:
            read = GgufCheckpoint(path)
            n_tokens = read.config.vocab_size
            token_ids_of(read.file, n_tokens), tokenizer_files(read.file, n_tokens, 64)
        except InputError as error:
            messages[key] = str(error)
            continue
        for name, array in whole.items():
            np.testing.assert_array_equal(read[name], array)
    assert "general.architecture" in messages  # no value here is an architecture
    for message in messages.values():
        assert message.startswith(f"{path}")


@pytest.mark.parametrize("key", ["llama.block_count", "tokenizer.ggml.bos_token_id"])
@pytest.mark.parametrize("value", ["x", 2.0, True, [1, 2], ["a"]])
def test_a_value_of_another_type_is_told_with_its_key(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str, value: Any
) -> None:
    plain = write_as_llama_cpp(tmp_path / "p.gguf", CONFIG, random_params(CONFIG, 0))
    path = ChangedKeys(plain).write(tmp_path / "m.gguf", {key: value})
    assert convert.main([str(path), str(tmp_path / "out")]) == 2
    shown = "a list of" if isinstance(value, list) else repr(value)
    err = capsys.readouterr().err
    assert err.startswith(f"error: {path}: {key} is {shown}")
    assert err.endswith("; an integer is needed; convert the model anew\n")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"split.count": [1, 2]}, "split.count is a list of integers; an integer is needed"),
        ({"general.architecture": [1]}, "general.architecture is a list of integers; a string"),
        ({"general.architecture": None}, "general.architecture is missing; only llama is read"),
        ({"llama.expert_count": [0, 0]}, "llama.expert_count is a list of integers; an integer"),
        ({"llama.rope.scaling.type": [1, 2]}, "llama.rope.scaling.type is a list of integers"),
        (
            {"llama.rope.scaling.original_context_length": [1, 2]},
            "llama.rope.scaling.original_context_length is a list of integers; an integer",
        ),
    ],
)
def test_compare_tells_the_key_of_an_odd_type(
    run: Callable, tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    plain = write_as_llama_cpp(tmp_path / "p.gguf", CONFIG, random_params(CONFIG, 0))
    path = ChangedKeys(plain).write(tmp_path / "m.gguf", changed)
    code, _, err = run(path)
    assert (code, err.count("\n")) == (2, 1)
    assert err.startswith(f"error: {path}: {message}")


@pytest.mark.parametrize(
    ("changed", "part"),
    [
        ({"split.count": 5, "split.no": 1, "general.architecture": None}, "part 2 of 5"),
        ({"split.count": 5, "split.no": 0}, "part 1 of 5"),
        ({"split.count": 5}, "one of 5 parts"),
    ],
)
def test_one_part_of_several_is_told_whatever_it_lacks(
    run: Callable, tmp_path: Path, changed: dict[str, Any], part: str
) -> None:
    plain = write_as_llama_cpp(tmp_path / "p.gguf", CONFIG, random_params(CONFIG, 0))
    path = ChangedKeys(plain).write(tmp_path / "m.gguf", changed)
    code, _, err = run(path)
    assert code == 2
    assert err == f"error: {path}: is {part}; join them first: llama-gguf-split --merge\n"


@pytest.mark.parametrize(
    "changed",
    [
        {"split.count": 1, "split.no": 0},
        {"llama.attention.head_count_kv": [1, 1]},
        {"llama.attention.head_count": [2, 2], "llama.feed_forward_length": [4, 4]},
        {"llama.logit_scale": 0.0, "llama.residual_scale": 1.0, "llama.embedding_scale": 1.0},
        {"llama.logit_scale": 1.0, "llama.attention.scale": 0.0, "llama.attention.causal": True},
        {"llama.rope.scaling.attn_factor": 1.0, "llama.expert_count": 0},
    ],
)
def test_what_changes_nothing_in_llama_cpp_is_read(tmp_path: Path, changed: dict[str, Any]) -> None:
    plain = write_as_llama_cpp(tmp_path / "p.gguf", CONFIG, random_params(CONFIG, 0))
    path = ChangedKeys(plain).write(tmp_path / "m.gguf", changed)
    found, whole = GgufCheckpoint(path), GgufCheckpoint(plain)
    assert found.config == whole.config == CONFIG
    for name, value in whole.items():
        np.testing.assert_array_equal(found[name], value)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"llama.attention.head_count_kv": [1, 2]},
            "head_count_kv is 1 to 2 by layer; layers that",
        ),
        ({"llama.attention.head_count_kv": [1]}, "head_count_kv has 1 entries; 2 are needed"),
        ({"llama.embedding_length": [8, 8]}, "embedding_length is a list of integers; an integer"),
        ({"llama.attention.head_count": [0, 0]}, "head_count is 0; a positive number is needed"),
        (
            {"llama.rope.scale_linear": math.nan},
            "llama.rope.scale_linear is nan; a positive number",
        ),
        ({"llama.rope.freq_base": math.inf}, "llama.rope.freq_base is inf; a positive number"),
        ({"llama.logit_scale": 0.5}, "not supported: llama.logit_scale=0.5"),
        ({"llama.attention.scale": 1.0}, "not supported: llama.attention.scale=1.0"),
        ({"llama.attention.causal": False}, "not supported: llama.attention.causal=False"),
    ],
)
def test_what_would_change_the_model_is_refused(
    run: Callable, tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    plain = write_as_llama_cpp(tmp_path / "p.gguf", CONFIG, random_params(CONFIG, 0))
    path = ChangedKeys(plain).write(tmp_path / "m.gguf", changed)
    code, _, err = run(path)
    assert (code, err.count("\n")) == (2, 1)
    assert err.startswith(f"error: {path}: ")
    assert message in err
