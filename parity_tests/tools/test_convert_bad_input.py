"""convert.py: bad input is one line, runs no code and leaves nothing."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llama_parity import convert
from reference_np.config import LlamaConfig

from ..conformance.strategies import random_params
from ..support.meta_checkpoints import CONFIG, LLAMA3_SCALING, a_meta, an_hf, write_hf
from ..support.tokenizers import pieces_model


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


def changed_part(folder: Path, change: Callable[[dict[str, Any]], object], shards: int = 2) -> Path:
    """Write a Meta checkpoint with its last file changed."""
    path = a_meta(folder, shards) / f"consolidated.{shards - 1:02}.pth"
    part = torch.load(path)
    change(part)
    torch.save(part, path)
    return folder


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


def far_layer(folder: Path) -> Path:
    """Write a name that would make 2^31 - 1 layers of a few, and params.json that says as many."""
    far = {"layers.2147483646.attention_norm.weight": torch.ones(24)}
    changed_part(folder, lambda tensors: tensors.update(far), 1)
    path = folder / "params.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"n_layers": 2**31 - 1}))
    return folder


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
    (meta(n_layers=2**31 - 1), "", ["n_layers is 2147483647, theirs 2"]),
    (far_layer, "", ["n_layers is 2147483647, theirs 3"]),
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
    (  # one stored number that strides of zero repeat
        part(lambda t: t.update({"norm.weight": torch.ones(1).expand(24)}), 1),
        "",
        ["norm.weight is no float tensor"],
    ),
    # the source
    (lambda folder: folder, "", ["no such file"]),
    (lambda folder: folder.mkdir() or folder, "", ["neither model.safetensors nor consolidated"]),
    (both, "", ["both model.safetensors and consolidated"]),
    (lambda folder: a_meta(folder) / "consolidated.00.pth", "", ["give the directory"]),
    (lambda folder: an_hf(folder) / "config.json", "", ["holds no weights; give its directory"]),
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


@pytest.mark.parametrize("to", ["hf", "meta"])
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "tokenizer.model"])
def test_a_cut_off_tokenizer_is_not_copied(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, to: str
) -> None:
    an_hf(tmp_path / "a")
    whole = pieces_model((), ()) if name == "tokenizer.model" else b'{"bos_token": "<s>"}'
    (tmp_path / "a" / name).write_bytes(whole[: len(whole) // 2])
    assert convert.main([str(tmp_path / "a"), str(tmp_path / "b"), "--to", to]) == 2
    assert f"{tmp_path / 'a' / name}: " in capsys.readouterr().err
    assert not (tmp_path / "b").exists()
