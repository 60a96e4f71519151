"""convert.py: which files are written, and what is in them."""

import json
import os
import resource
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from llama_parity import convert
from llama_parity.conversion import hf_checkpoint

from ..conformance.strategies import random_params
from ..support.meta_checkpoints import (
    CONFIG,
    CUT,
    a_meta,
    an_hf,
    assert_same_bits,
    bits,
    meta_params,
    meta_tensors,
    read_hf,
    read_meta,
    write_hf,
    write_meta,
)
from ..support.tokenizers import pieces_model
from .commands import run_convert

ROOT = Path(__file__).parent.parent.parent


def test_what_surrounds_the_weights_comes_along(tmp_path: Path) -> None:
    an_hf(tmp_path / "a")
    hf = CONFIG.to_hf() | {"bos_token_id": 1, "eos_token_id": [2, 3], "use_cache": True}
    (tmp_path / "a" / "config.json").write_text(json.dumps(hf))
    contents = {"tokenizer.model": pieces_model((), ()), "tokenizer.json": b'{"any": 1}'}
    contents["chat_template.jinja"] = os.urandom(20)
    names = tuple(contents)
    for name, content in contents.items():
        (tmp_path / "a" / name).write_bytes(content)
    run_convert(tmp_path / "a", tmp_path / "b")
    run_convert(tmp_path / "b", tmp_path / "c")
    run_convert(tmp_path / "a", tmp_path / "d", "--to", "hf")
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
    run_convert(tmp_path / "m.safetensors", tmp_path / "empty")
    run_convert(
        *(tmp_path / "empty", tmp_path / "b", "--max-seq-len", CONFIG.max_seq_len),
        *("--bos-token-id", 0, "--eos-token-id", 1),
    )
    assert_same_bits(read_hf(tmp_path / "b"), tensors)


def test_what_the_files_of_other_years_hold(tmp_path: Path) -> None:
    """Parameters, transposed memory, and the format from before archives."""
    tensors = meta_tensors(CUT)
    odd = {name: torch.nn.Parameter(value.t().contiguous().t()) for name, value in tensors.items()}
    a_meta(tmp_path / "a", 1)
    path = tmp_path / "a" / "consolidated.00.pth"
    for archive in (False, True):
        torch.save(odd, path, _use_new_zipfile_serialization=archive)
        run_convert(tmp_path / "a", tmp_path / f"b{archive}", "--to", "meta")
        assert_same_bits(read_meta(tmp_path / f"b{archive}", 1)[1], tensors)


def test_hugging_faces_form_is_written_one_tensor_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In another dtype, too, none but the tensor in hand is in memory."""
    alive: list[weakref.ref[torch.Tensor]] = []
    real, at_once = hf_checkpoint.stored, []

    def stored(*args: Any) -> torch.Tensor:
        tensor = real(*args)
        alive.append(weakref.ref(tensor))
        at_once.append(sum(ref() is not None for ref in alive))
        return tensor

    monkeypatch.setattr(hf_checkpoint, "stored", stored)
    run_convert(an_hf(tmp_path / "a"), tmp_path / "b", "--to", "hf", "--dtype", "bfloat16")
    assert len(at_once) == len(read_hf(tmp_path / "b"))
    assert max(at_once) == 1


def test_tensors_of_several_dtypes_lie_at_multiples_of_their_elements(tmp_path: Path) -> None:
    config = replace(CONFIG, vocab_size=7)
    tensors = {n: torch.from_numpy(v).float() for n, v in random_params(config, 0).items()}
    for i, name in enumerate(tensors):
        tensors[name] = tensors[name].to([torch.bfloat16, torch.float64, torch.float32][i % 3])
    write_hf(tmp_path / "a", config, tensors, 1)
    run_convert(tmp_path / "a", tmp_path / "b", "--to", "hf")
    assert_same_bits(read_hf(tmp_path / "b"), tensors)
    data = (tmp_path / "b" / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    assert length % 8 == 0
    header = json.loads(data[8 : 8 + length])
    assert header.pop("__metadata__")["format"] == "pt"
    for name, entry in header.items():
        assert entry["data_offsets"][0] % tensors[name].element_size() == 0


def test_matrices_that_share_their_memory(tmp_path: Path) -> None:
    one, other = (f"layers.{i}.feed_forward.w1.weight" for i in range(2))
    tensors = meta_tensors(CUT)
    tensors[other] = tensors[one]
    write_meta(tmp_path / "a", meta_params(CONFIG), tensors, 1)
    run_convert(tmp_path / "a", tmp_path / "b")
    written = read_hf(tmp_path / "b")
    for i in range(2):
        assert bits(written[f"model.layers.{i}.mlp.gate_proj.weight"]) == bits(tensors[one])


def test_views_are_stored_without_what_they_are_views_of(tmp_path: Path) -> None:
    an_hf(tmp_path / "a")
    for shards in (1, 2):
        run_convert(tmp_path / "a", tmp_path / f"b{shards}", "--shards", shards)
    whole = (tmp_path / "b1" / "consolidated.00.pth").stat().st_size
    assert (tmp_path / "b2" / "consolidated.01.pth").stat().st_size < 0.65 * whole


@pytest.mark.parametrize("different", [-0.0, 1.0])
def test_only_equal_bits_are_tied(tmp_path: Path, different: float) -> None:
    tensors = meta_tensors(CUT)
    tensors["tok_embeddings.weight"][3, 3] = 0.0
    tensors["output.weight"] = tensors["tok_embeddings.weight"].clone()
    write_meta(tmp_path / "a", meta_params(CONFIG), tensors, 1)
    run_convert(tmp_path / "a", tmp_path / "tied")
    assert "lm_head.weight" not in read_hf(tmp_path / "tied")
    tensors["output.weight"][3, 3] = different
    write_meta(tmp_path / "b", meta_params(CONFIG), tensors, 1)
    run_convert(tmp_path / "b", tmp_path / "untied")
    written = read_hf(tmp_path / "untied")["lm_head.weight"]
    assert bits(written) == bits(tensors["output.weight"])


def test_an_interrupted_conversion_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    an_hf(tmp_path / "a")
    monkeypatch.setattr(torch, "save", interrupted)
    assert convert.main([str(tmp_path / "a"), str(tmp_path / "b")]) == 130
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_what_killed_conversions_left_is_removed_and_no_other_folder(tmp_path: Path) -> None:
    """In a container every start may have the number of the one that was killed."""
    an_hf(tmp_path / "a")
    mine = [".b.old.tmp", ".b.1.2.tmp", "b.9999999.tmp", f".c.{os.getpid()}.tmp", ".b.9-9-9.tmp"]
    mine += [f".b.{os.getppid()}.tmp"]  # another process's that is alive
    left_over = [f".b.{os.getpid()}.tmp", f".b.0-{os.getpid()}.tmp", ".b.9999999.tmp"]
    left_over += [f".b.{'9' * 30}.tmp"]
    for name in (*mine, *left_over):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("half")
    run_convert(tmp_path / "a", tmp_path / "b")
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b", *mine}


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


def test_it_runs_as_a_script(tmp_path: Path) -> None:
    an_hf(tmp_path / "a")
    command = [sys.executable, "tools/convert.py", tmp_path / "a", tmp_path / "b"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "--max-seq-len" in done.stdout
