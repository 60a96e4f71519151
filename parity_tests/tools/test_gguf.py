"""GGUF files: what is read is what was written, and the same numbers as ggml's own package."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llama_parity import convert
from llama_parity.conversion.gguf_checkpoint import GgufCheckpoint, gguf_name, interleaved
from reference_np.checkpoint import Checkpoint
from reference_np.config import LlamaConfig

from ..backends.torch_model import save_numpy
from ..conformance.architectures import seeds
from ..conformance.strategies import cast, random_params
from ..support.meta_checkpoints import DTYPES, assert_same_bits, read_hf, write_hf
from .commands import run_convert
from .gguf_files import write_as_llama_cpp

gguf = pytest.importorskip("gguf")

LLAMA3 = {
    **{"rope_type": "llama3", "rope_factor": 8.0, "rope_low_freq_factor": 1.0},
    **{"rope_high_freq_factor": 4.0, "rope_original_max_seq_len": 8192},
}
CONFIG = LlamaConfig(64, 2, 4, 2, 8, 96, 300, max_seq_len=2048, rope_theta=5e5)


@st.composite
def configs(draw: st.DrawFn) -> LlamaConfig:
    """Any heads, head_dim apart from dim / n_heads, every rotary kind, tied or not."""
    kind = draw(st.sampled_from(["default", "linear", "llama3"]), label="rope_type")
    factor = draw(st.floats(1.1, 64), label="factor")
    scaling: dict[str, Any] = {} if kind == "default" else {"rope_factor": factor}
    if kind == "llama3":
        low = draw(st.floats(0.5, 2), label="low")
        scaling |= {"rope_low_freq_factor": low, "rope_high_freq_factor": low + 1.5}
        scaling["rope_original_max_seq_len"] = draw(st.integers(8, 9999), label="original")
    n_kv_heads = draw(st.integers(1, 3), label="n_kv_heads")
    return LlamaConfig(
        dim=draw(st.integers(1, 40), label="dim"),
        n_layers=draw(st.integers(1, 3), label="n_layers"),
        n_heads=n_kv_heads * draw(st.integers(1, 3), label="n_rep"),
        n_kv_heads=n_kv_heads,
        head_dim=2 * draw(st.integers(1, 6), label="head_dim / 2"),
        hidden_dim=draw(st.integers(1, 40), label="hidden_dim"),
        vocab_size=draw(st.integers(2, 30), label="vocab_size"),
        max_seq_len=draw(st.integers(2, 9999), label="max_seq_len"),
        norm_eps=draw(st.floats(1e-7, 1e-2), label="norm_eps"),
        rope_theta=draw(st.floats(100.0, 1e7), label="rope_theta"),
        tie_embeddings=draw(st.booleans(), label="tie_embeddings"),
        rope_type=kind,
        **scaling,
    )


@given(config=configs(), seed=seeds, dtype=st.sampled_from(["float32", "float16", "bfloat16"]))
def test_from_hugging_face_and_back(
    tmp_path_factory: pytest.TempPathFactory, config: LlamaConfig, seed: int, dtype: str
) -> None:
    folder = tmp_path_factory.mktemp("gguf")
    params = random_params(config, seed)
    tensors = {name: torch.from_numpy(x).to(DTYPES[dtype]) for name, x in params.items()}
    write_hf(folder / "a", config, tensors, 1)
    run_convert(folder / "a", folder / "b.gguf")
    run_convert(folder / "b.gguf", folder / "c")
    assert LlamaConfig.from_hf(json.loads((folder / "c" / "config.json").read_text())) == config
    # Vectors are F32 there, as llama.cpp's kernels want them.
    assert_same_bits(read_hf(folder / "c"), tensors)
    assert json.loads((folder / "c" / "config.json").read_text())["dtype"] == dtype
    run_convert(folder / "b.gguf", folder / "d", "--dtype", dtype)
    assert_same_bits(read_hf(folder / "d"), tensors)
    read, expected = GgufCheckpoint(folder / "b.gguf", np.float64), Checkpoint(folder / "a", "f8")
    assert (read.config, list(read)) == (expected.config, list(random_params(config, 0)))
    for name, value in expected.items():
        np.testing.assert_array_equal(read[name], value)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("F16", torch.float16), ("BF16", torch.bfloat16), ("Q8_0", torch.float32)],
)
def test_vectors_that_the_matrices_dtype_does_not_hold_stay_and_are_noted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, dtype: torch.dtype
) -> None:
    params = cast(random_params(CONFIG, 0), np.float32)
    path = write_as_llama_cpp(tmp_path / "m.gguf", CONFIG, params, kind)
    run_convert(path, tmp_path / "out")
    said = capsys.readouterr().err
    is_noted = f"note: {path}: model.layers.0.input_layernorm.weight does not fit" in said
    assert is_noted == (kind != "Q8_0")
    tensors = read_hf(tmp_path / "out")
    for name, tensor in tensors.items():
        assert tensor.dtype == (torch.float32 if tensor.ndim == 1 else dtype)
        if tensor.ndim == 1:
            np.testing.assert_array_equal(tensor.numpy(), params[name])
    found = json.loads((tmp_path / "out" / "config.json").read_text())["dtype"]
    assert found == str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0"])
@pytest.mark.parametrize("scaling", [{}, {"rope_type": "linear", "rope_factor": 4.0}, LLAMA3])
def test_a_file_of_llama_cpp_has_the_packages_own_numbers(
    tmp_path: Path, kind: str, scaling: dict[str, Any]
) -> None:
    config = dataclasses.replace(CONFIG, **scaling)
    params = cast(random_params(config, 0), np.float32)
    read = GgufCheckpoint(write_as_llama_cpp(tmp_path / "m.gguf", config, params, kind))
    assert read.config == config
    theirs = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    for name in params:
        tensor = theirs[gguf_name(name)]
        value = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(params[name].shape)
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = config.n_heads if "q_proj" in name else config.n_kv_heads
            value = value.reshape(heads, -1, 2, config.dim).swapaxes(1, 2).reshape(-1, config.dim)
        assert read[name].tobytes() == value.tobytes(), name
        if kind == "F32":
            np.testing.assert_array_equal(read[name], params[name])


@pytest.mark.parametrize("factor", [8.0, 32.0])
@pytest.mark.parametrize("head_dim", [8, 64, 128])
def test_the_divisors_of_llama_3_tell_its_scaling(
    tmp_path: Path, factor: float, head_dim: int
) -> None:
    scaling = LLAMA3 | {"rope_factor": factor}
    config = LlamaConfig(8, 1, 1, 1, head_dim, 8, 8, rope_theta=5e5, **scaling)
    params = random_params(config, 0)
    assert GgufCheckpoint(write_as_llama_cpp(tmp_path / "m.gguf", config, params)).config == config
    other = dataclasses.replace(config, rope_high_freq_factor=5.0)
    refused = write_as_llama_cpp(tmp_path / "n.gguf", other, params)
    with pytest.raises(Exception, match=r"n\.gguf: rope_freqs\.weight is not Llama 3's scaling"):
        GgufCheckpoint(refused)


def test_what_llama_cpp_leaves_out_is_derived(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, head_dim=16, n_kv_heads=4, tie_embeddings=True)
    config = dataclasses.replace(config, rope_theta=10000.0)
    changed = dict.fromkeys(("attention.key_length", "attention.value_length", "vocab_size"))
    changed |= dict.fromkeys(("attention.head_count_kv", "rope.freq_base", "rope.dimension_count"))
    params = random_params(config, 0)
    path = write_as_llama_cpp(tmp_path / "m.gguf", config, params, **changed)
    assert GgufCheckpoint(path).config == config


REFUSED = [
    ({"expert_count": 8}, "not supported: llama.expert_count=8"),
    ({"attention.scale": 0.5}, "not supported: llama.attention.scale=0.5"),
    ({"rope.scaling.type": "yarn"}, "llama.rope.scaling.type 'yarn'"),
    ({"attention.value_length": 4}, "heads of several sizes are not supported"),
    ({"rope.dimension_count": 4}, "heads of several sizes are not supported"),
    ({"block_count": None}, "llama.block_count is missing; a positive number is needed"),
    ({"block_count": 2**31 - 1}, "model.layers.2.input_layernorm.weight is missing"),
    ({"attention.head_count": 0}, "llama.attention.head_count is 0"),
    ({"attention.layer_norm_rms_epsilon": 1}, "epsilon is 1; a float is needed"),
    ({"vocab_size": 299}, "llama.vocab_size is not 300"),
]


@pytest.mark.parametrize(("changed", "message"), REFUSED)
def test_what_is_not_supported_is_refused_by_name(
    run: Callable, tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    path = write_as_llama_cpp(tmp_path / "m.gguf", CONFIG, random_params(CONFIG, 0), **changed)
    code, _, err = run(path)
    assert (code, err.count("\n")) == (2, 1)
    assert err.startswith(f"error: {path}: ")
    assert message in err
    assert convert.main([str(path), str(tmp_path / "out")]) == 2
    assert not (tmp_path / "out").exists()


def test_a_foreign_or_truncated_file_is_refused(run: Callable, tmp_path: Path) -> None:
    path = write_as_llama_cpp(tmp_path / "m.gguf", CONFIG, random_params(CONFIG, 0))
    content, cut = path.read_bytes(), tmp_path / "cut.gguf"
    for part, message in (
        (content[:-40], "ends at"),
        (content[:200], "ends within its header"),
        (content[:4], "ends within its header"),
        (b"", "is no GGUF file"),
        (b"PK\3\4" + content[4:], "is no GGUF file"),
        (content[:4] + b"\1\0\0\0" + content[8:], "of version 1"),
        (content[:4] + b"\0\0\0\3" + content[8:], "big-endian"),
        (content[:8] + b"\xff" * 8 + content[16:], ""),
        (content[:16] + b"\xff" * 8 + content[24:], ""),
        (content.replace(b"llama", b"qwen3", 1), "'qwen3'; only llama is read"),
    ):
        cut.write_bytes(part)
        code, _, err = run(cut)
        assert (code, err.count("\n")) == (2, 1), err
        assert message in err


def test_another_quantisation_is_refused_by_name(run: Callable, tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    raw = gguf.GGMLQuantizationType.Q4_0
    writer.add_tensor("token_embd.weight", np.zeros((4, 18), np.uint8), raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    code, _, err = run(tmp_path / "m.gguf")
    assert (code, err.count("\n")) == (2, 1)
    assert "token_embd.weight is stored as Q4_0, which is not read" in err


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_compare_agrees_with_itself_and_with_safetensors(
    report: Callable, tmp_path: Path, kind: str
) -> None:
    config = dataclasses.replace(CONFIG, **LLAMA3)
    params = cast(random_params(config, 0), np.float32)
    path = write_as_llama_cpp(tmp_path / "m.gguf", config, params, kind)
    quick = ("--tokens", 8, "--steps", 0)
    assert report(path, *quick)["verdict"]["holds"]
    run_convert(path, tmp_path / "hf")
    for pair in ((path, tmp_path / "hf"), (tmp_path / "hf", path)):
        assert report(pair[0], "--against", pair[1], *quick)["verdict"]["holds"]
    halves = {n: interleaved(x, config.n_heads) if "q_proj" in n else x for n, x in params.items()}
    save_numpy(halves, tmp_path / "bad.safetensors", {"config": config.to_json()})
    assert not report(path, "--against", tmp_path / "bad.safetensors", *quick)["verdict"]["holds"]


def test_a_float64_checkpoint_and_a_taken_name_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = {name: torch.from_numpy(x) for name, x in random_params(CONFIG, 0).items()}
    write_hf(tmp_path / "a", CONFIG, tensors, 1)
    assert convert.main([str(tmp_path / "a"), str(tmp_path / "b.gguf")]) == 2
    assert "hold no float64; give --dtype float32" in capsys.readouterr().err
    assert not (tmp_path / "b.gguf").exists()
    run_convert(tmp_path / "a", tmp_path / "b.gguf", "--dtype", "float32")
    for argv in (("a", "b.gguf"), ("b.gguf", "c", "--to", "meta"), ("a", "c", "--to", "gguf")):
        assert (
            convert.main([str(tmp_path / w) if w in ("a", "c", "b.gguf") else w for w in argv]) == 2
        )
    assert not (tmp_path / "c").exists()


def test_names_and_rows_are_llama_cpps(tmp_path: Path) -> None:
    """By the package's own table, and by the order that was run in llama.cpp itself."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, CONFIG.n_layers)
    params = random_params(CONFIG, 0)
    for name in params:
        assert gguf_name(name) == names.get_name(name, try_suffixes=(".weight",))
    for part, heads in (("q", CONFIG.n_heads), ("k", CONFIG.n_kv_heads)):
        value = params[f"model.layers.0.self_attn.{part}_proj.weight"]
        pairs = torch.from_numpy(value).unflatten(0, (-1, 2, CONFIG.head_dim // 2))
        expected = pairs.transpose(1, 2).flatten(0, 2)
        np.testing.assert_array_equal(interleaved(value, heads), expected.numpy())


@pytest.mark.filterwarnings("ignore")  # those of its own reader and of accelerate
@pytest.mark.parametrize("tied", [False, True])
def test_transformers_reads_the_same(tmp_path: Path, tied: bool) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")  # it does not read GGUF files without
    config = dataclasses.replace(CONFIG, head_dim=16, tie_embeddings=tied)
    tensors = {n: torch.from_numpy(x).float() for n, x in random_params(config, 0).items()}
    write_hf(tmp_path / "a", config, tensors, 1)
    run_convert(tmp_path / "a", tmp_path / "m.gguf")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf")
    theirs = model.state_dict()
    for name, value in tensors.items():
        assert torch.equal(theirs[name].float(), value), name
