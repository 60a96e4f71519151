"""Directories as people have them: what they say twice, and what they hold in place of weights."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from llama_common import notes
from llama_common.errors import InputError
from llama_parity import convert
from llama_torch.checkpoint import step_folders
from llama_torch.checkpoint.hf import load_model
from llama_torch.checkpoint.single_file import SingleFile
from llama_torch.inference.generation_file import end_ids
from llama_torch.model.config import ModelConfig
from llama_torch.model.llama import Llama
from llama_torch.tokenizer.loading import load_tokenizer
from llama_torch.training import run_dir, tensorboard
from reference_np.checkpoint import Checkpoint

from ..support.tokenizers import byte_level

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
SHARD = "model-00001-of-00001.safetensors"


@pytest.fixture(autouse=True)
def _said_anew() -> None:
    notes.note.cache_clear()


def config(tied: bool = True) -> ModelConfig:
    return ModelConfig(
        dim=16,
        n_layers=1,
        n_heads=2,
        n_kv_heads=2,
        vocab_size=32,
        max_seq_len=16,
        tie_embeddings=tied,
    )


def weights(seed: int = 0, tied: bool = True) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return {n: torch.randn(p.shape) for n, p in Llama(config(tied)).state_dict().items()}


def write(folder: Path, tensors: dict[str, torch.Tensor], name: str = "model.safetensors") -> None:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config().to_hf()))
    save_file(tensors, folder / name, {"format": "pt"})


def require_holds(folder: Path, expected: dict[str, torch.Tensor]) -> None:
    """Both readers find these weights."""
    found, oracle = load_model(folder).state_dict(), Checkpoint(folder)
    assert set(found) == set(oracle) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor)
        assert np.array_equal(oracle[name], tensor.numpy())


def test_a_whole_model_is_read_and_not_the_index_of_an_earlier_save(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As transformers does, which leaves the index where it was."""
    old, new = weights(0), weights(1)
    write(tmp_path, old, SHARD)
    index = {"weight_map": dict.fromkeys(old, SHARD)}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    require_holds(tmp_path, old)
    assert capsys.readouterr().err == ""
    write(tmp_path, new)
    require_holds(tmp_path, new)
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"note: {tmp_path}/model.safetensors is read; ")


def test_an_index_that_names_the_whole_model_is_no_difference(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, weights())
    index = {"weight_map": dict.fromkeys(weights(), "model.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    require_holds(tmp_path, weights())
    assert capsys.readouterr().err == ""


def test_a_tied_model_may_be_stored_as_its_head(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """As safetensors.torch.save_model stores it, which keeps one name of two."""
    tensors = weights()
    write(tmp_path, tensors | {HEAD: tensors[EMBEDDING].clone()})
    require_holds(tmp_path, tensors)
    write(tmp_path, {HEAD if n == EMBEDDING else n: t for n, t in tensors.items()})
    require_holds(tmp_path, tensors)
    converted = tmp_path_factory.mktemp("converted")
    assert convert.main([str(tmp_path), str(converted), "--to", "hf"]) == 0
    require_holds(converted, tensors)
    write(tmp_path, tensors | {HEAD: tensors[EMBEDDING] + 1})
    for read in (load_model, Checkpoint):
        with pytest.raises(ValueError, match=r"lm_head\.weight is not the embedding although"):
            read(tmp_path)


def pickled(folder: Path) -> None:
    (folder / "pytorch_model-00001-of-00002.bin").write_bytes(b"x")


def adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(b"x")


def pointer(folder: Path) -> None:
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    (folder / "model.safetensors").write_text(text)


def compiled(folder: Path) -> None:
    write(folder, {f"_orig_mod.{name}": tensor for name, tensor in weights().items()})


def nothing(folder: Path) -> None:
    pass


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (pickled, r"holds pytorch_model-00001-of-00002\.bin and no .*weights_only=True"),
        (adapter, r"is an adapter .* merge it into that first"),
        (pointer, r"model\.safetensors: is a git-LFS pointer and not the file; run git lfs pull"),
        (compiled, r"its names begin with _orig_mod\., .* save model\._orig_mod\.state_dict\(\)"),
        (nothing, r"model\.safetensors: no such file"),
    ],
)
def test_what_stands_in_place_of_the_weights_is_named_with_a_remedy(
    tmp_path: Path, make: Callable[[Path], None], message: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config().to_hf()))
    make(tmp_path)
    with pytest.raises(InputError, match=message) as caught:
        load_model(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_a_pointer_in_place_of_a_json_file_is_named(tmp_path: Path, name: str) -> None:
    byte_level(tmp_path)
    write(tmp_path, weights())
    pointer(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / name)
    read: Any = load_model if name == "config.json" else lambda path: load_tokenizer(path, 700)
    save_file(weights(), tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=f"{name}: is a git-LFS pointer"):
        read(tmp_path)


def test_a_pad_token_one_beyond_the_embedding_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    byte_level(tmp_path)
    n_ids = load_tokenizer(tmp_path, 700).n_ids
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings |= {"pad_token": "[PAD]", "extra_special_tokens": ["[PAD]"]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert load_tokenizer(tmp_path, n_ids + 1).special["[PAD]"] == n_ids
    assert capsys.readouterr().err == ""
    tokenizer = load_tokenizer(tmp_path, n_ids)
    assert "[PAD]" not in tokenizer.special
    assert tokenizer.n_ids == n_ids
    assert max(tokenizer.encode("a [PAD] b")) < n_ids
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("note: ")
    assert f"'[PAD]' has id {n_ids}, beyond the model's vocabulary" in line
    del settings["pad_token"]  # another token there is of another checkpoint
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match=f"has token id {n_ids}, beyond"):
        load_tokenizer(tmp_path, n_ids)


@pytest.mark.parametrize(
    ("generation", "config_json", "expected", "is_said"),
    [
        (None, None, {1}, False),
        (None, 1, {1}, False),
        ([1, 7], 1, {1, 7}, False),
        ([1, 7], [7, 1], {1, 7}, False),
        (7, None, {1, 7}, True),
        ([7], [8], {1, 7, 8}, True),
    ],
)
def test_a_text_ends_at_every_end_token_that_a_file_names(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    generation: Any,
    config_json: Any,
    expected: set[int],
    is_said: bool,
) -> None:
    byte_level(tmp_path)  # whose tokenizer names 1
    for name, ids in (("generation_config.json", generation), ("config.json", config_json)):
        if ids is not None:
            (tmp_path / name).write_text(json.dumps({"eos_token_id": ids}))
    assert end_ids(tmp_path, load_tokenizer(tmp_path, 700), 700) == expected
    said = capsys.readouterr().err
    assert said.count("\n") == is_said
    assert ("end tokens differ" in said) == is_said


@pytest.mark.parametrize("has_file", [True, False])
@pytest.mark.parametrize("odd", [0, 1, 2])
def test_a_config_stored_in_any_shard_is_compared(tmp_path: Path, odd: int, has_file: bool) -> None:
    """Beside config.json, or with the other shards' where there is none."""
    tensors, names = weights(), [f"model-{i}.safetensors" for i in range(3)]
    own = json.dumps(config().to_hf())
    shards = {names[i]: dict(list(tensors.items())[i::3]) for i in range(3)}
    weight_map = {tensor: name for name, part in shards.items() for tensor in part}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))

    def save(number: int, metadata: dict[str, str]) -> None:
        save_file(shards[names[number]], tmp_path / names[number], {"format": "pt", **metadata})

    for number in range(3):  # one shard has none
        save(number, {} if number == (odd + 1) % 3 else {"config": own})
    if has_file:
        (tmp_path / "config.json").write_text(own)
    require_holds(tmp_path, tensors)
    save(odd, {"config": json.dumps(config().to_hf() | {"rms_norm_eps": 0.25})})
    for read in (load_model, Checkpoint):
        with pytest.raises(ValueError, match=r"contradicts the config stored in .*") as caught:
            read(tmp_path)
        assert (names[odd] in str(caught.value)) or not has_file
        assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("name", ["²", "٣", "1²", "0x1", ""])
def test_a_name_that_is_no_decimal_number_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Python's isdigit holds of characters that its int refuses, or reads as other digits."""
    (tmp_path / "checkpoints" / "12").mkdir(parents=True)
    (tmp_path / "checkpoints" / name).mkdir(exist_ok=True)
    assert step_folders.steps(tmp_path) == [12]
    monkeypatch.setattr(run_dir, "RUNS", tmp_path / "checkpoints")
    assert run_dir._next_run() == tmp_path / "checkpoints" / "13"
    for number in ("000007", name):
        (tmp_path / f"{tensorboard.NAME}{number}.run").touch()
    assert tensorboard._next_number(tmp_path) == 8
    save_file({}, tmp_path / "training_state.safetensors", {"step": name})
    with pytest.raises(InputError, match="names no step"):
        SingleFile(tmp_path).metadata()
