"""Steps of a training state and the best loss: a changed one is refused, or changes nothing."""

import itertools
import json
import math
import os
import pickle
import resource
import struct
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

from llama_common.errors import InputError
from llama_torch.checkpoint import step_folders
from llama_torch.checkpoint.shards import StateShards
from llama_torch.checkpoint.single_file import SingleFile
from llama_torch.checkpoint.state_interface import TrainingState, check_steps
from llama_torch.common.state_file import checksum, with_checksum
from llama_torch.training.file_saver import read_best_loss

from ..support import state_files
from ..support.state_files import Mutation

TENSORS = {"parameter.x": torch.arange(6.0).view(2, 3)}
STATE = TrainingState(TENSORS, 6, [2, 3])


def write_with_metadata(path: Path, metadata: str) -> None:
    """Write a safetensors file without tensors whose metadata is a text, JSON or not."""
    header = f'{{"__metadata__": {metadata}}}'.encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)


def is_possible(found: tuple[int, list[int]]) -> bool:
    step, skipped = found
    kinds = {type(step), *map(type, skipped)}
    in_order = skipped == sorted(set(skipped)) and all(1 <= n <= step for n in skipped)
    return kinds == {int} and 0 <= step < 1 << 63 and in_order


def single_file_metadata(folder: Path) -> tuple[Path, dict[str, Any]]:
    single = SingleFile(folder)
    single.write(STATE)
    assert single.metadata() == (6, [2, 3])
    return single.path, {"step": "6", "skipped": "[2, 3]"}


def same_or_possible(renew: bool) -> Any:
    """Return the test of what is accepted: with a checksum made to fit, any possible steps."""
    return is_possible if renew else lambda found: found == (6, [2, 3])


@pytest.mark.parametrize("renew", [False, True], ids=["kept checksum", "renewed checksum"])
def test_changed_metadata_of_one_file(tmp_path: Path, renew: bool) -> None:
    path, content = single_file_metadata(tmp_path)
    mutations = itertools.chain(
        state_files.mutations(content, renew),
        (
            Mutation(f"skipped = {text[:20]}", json.dumps({**content, "skipped": text, **extra}))
            for text in state_files.SPELLINGS.values()
            for text in (text, f"[{text}]", f"[2, {text}]")
            for extra in [{"sha256": checksum({**content, "skipped": text})} if renew else {}]
        ),
        (
            Mutation(f"step = {text[:20]}", json.dumps({**content, "step": text}))
            for text in ("٣", "+6", " 6", "6_0", "0x6", "6" * 5000, str(1 << 63))
        ),
    )

    def use() -> tuple[int, list[int]]:
        return SingleFile(tmp_path).metadata()

    # Without a checksum any possible steps are an earlier version's.
    wrong = state_files.failures(mutations, path, use, is_possible, write_with_metadata)
    assert wrong == []
    if not renew:
        kept = with_checksum(content)
        for change in ({"step": "7"}, {"skipped": "[2, 4]"}, {"skipped": "[]"}):
            write_with_metadata(path, json.dumps(kept | change))
            with pytest.raises(InputError, match="is not as it was written.*copy the checkpoint"):
                use()


@pytest.mark.parametrize("renew", [False, True], ids=["kept checksum", "renewed checksum"])
def test_changed_metadata_of_shards(tmp_path: Path, renew: bool) -> None:
    shards = StateShards(tmp_path)
    shards.write_metadata(6, [2, 3])
    assert shards.metadata() == (6, [2, 3])
    path, content = tmp_path / "state.json", {"step": 6, "skipped": [2, 3]}
    assert state_files.read(path) == content
    mutations = state_files.mutations(content, renew)
    wrong = state_files.failures(mutations, path, shards.metadata, same_or_possible(renew))
    assert wrong == []
    path.write_text(json.dumps(content))  # as an earlier version wrote it
    assert shards.metadata() == (6, [2, 3])


steps_of_any_kind = st.integers(-2, 12) | st.integers() | st.booleans() | st.none() | st.floats()


@given(step=steps_of_any_kind, skipped=st.lists(steps_of_any_kind, max_size=6) | st.text())
def test_only_possible_steps_are_taken(step: Any, skipped: Any) -> None:
    try:
        assert is_possible(check_steps(step, skipped))
    except ValueError:
        assert type(step) is not int or not isinstance(skipped, list) or not_possible(step, skipped)


def not_possible(step: int, skipped: list[Any]) -> bool:
    return any(type(n) is not int for n in skipped) or not is_possible((step, skipped))


# best/


@pytest.fixture
def best(tmp_path: Path) -> Path:
    (tmp_path / "best").mkdir()
    return tmp_path / "best" / "model.safetensors"


@pytest.mark.parametrize("renew", [False, True], ids=["kept checksum", "renewed checksum"])
def test_a_changed_best_loss(best: Path, renew: bool) -> None:
    content = {"step": "4", "val_loss": "4.25"}
    save_file({}, best, with_checksum(content))
    out = best.parent.parent
    assert read_best_loss(out) == 4.25
    mutations = state_files.mutations(content, renew)

    def same(found: float) -> bool:
        return found == 4.25 if not renew else 0 <= found < math.inf

    wrong = state_files.failures(
        mutations, best, partial(read_best_loss, out), same, write_with_metadata
    )
    assert wrong == []


@pytest.mark.parametrize(
    "text",
    ["nan", "inf", "-inf", "--1.0", "1e400", "", " 1.0", "1_0", "٣", "0x1p3", "1" * 5000],
    ids=lambda text: repr(text[:9]),
)
def test_a_best_loss_that_is_none(best: Path, text: str) -> None:
    """An earlier version's file, without a checksum; not a number could never be beaten."""
    write_with_metadata(best, json.dumps({"step": "4", "val_loss": text}))
    with pytest.raises(InputError, match=r"its val_loss is .*; delete .*best to go on without it"):
        read_best_loss(best.parent.parent)


@pytest.mark.parametrize("loss", [0.0, 5e-324, 1e-5, 4.25, 1 / 3, 10.824905395507812, -2.5, -1e-7])
def test_every_loss_is_read_again(best: Path, loss: float) -> None:
    write_with_metadata(best, json.dumps({"step": "4", "val_loss": repr(loss)}))
    assert read_best_loss(best.parent.parent) == loss


def test_a_best_model_without_a_loss(best: Path) -> None:
    save_file({}, best, {"format": "pt"})
    with pytest.raises(InputError, match="its val_loss is ''; delete"):
        read_best_loss(best.parent.parent)


# Step folders


def test_only_folders_as_they_are_written_are_checkpoints(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    for name in ("12", "7", "007", "1" + "0" * 30, "-3", "5.tmp"):
        (folder / name).mkdir(parents=True)
    (folder / "13").write_text("a file")
    assert step_folders.steps(tmp_path) == [7, 12]
    assert step_folders.newest(tmp_path) == folder / "12"


# The index of shards


@pytest.fixture
def shards(tmp_path: Path) -> StateShards:
    found = StateShards(tmp_path / "6")
    with warnings.catch_warnings(action="ignore"):  # torch tells that there is no job
        found.write(TENSORS, alone=True)
    found.write_metadata(6, [])
    assert torch.equal(found.read_whole(TENSORS)["parameter.x"], TENSORS["parameter.x"])
    return found


def deep(n: int) -> Any:
    """Return a tuple of tuples that is small, and has 2^n places."""
    found: Any = ()
    for _ in range(n):
        found = (found, found)
    return found


def pickles() -> dict[str, bytes]:
    return {
        "a place in the table far out": b"\x80\x04]r\xff\xff\xff\x7f.",
        "a long text": b"\x80\x04\x8d" + struct.pack("<Q", 1 << 40) + b"x.",
        "long bytes": b"\x80\x04\x8e" + struct.pack("<Q", 1 << 40) + b"x.",
        "a long frame": b"\x80\x04\x95" + struct.pack("<Q", 1 << 40) + b"x.",
        "a long number": b"\x80\x04\x8b" + struct.pack("<i", (1 << 31) - 1) + b"x.",
        "a key whose hash never ends": b"\x80\x04}" + operations(deep(60)) + b"Ns.",
        "keys whose hash never ends": b"\x80\x04}(" + operations(deep(60)) + b"Nu.",
        "a dict whose key's hash never ends": b"\x80\x04(" + operations(deep(60)) + b"Nd.",
        "a set": pickle.dumps({1, 2}),
        "a frozen set": pickle.dumps(frozenset({1})),
        "no object": b"",
    }


def operations(value: Any) -> bytes:
    """Return a pickle's operations without its start and its end."""
    content = pickle.dumps(value, 3)
    assert content[:2] == b"\x80\x03"
    return content[2:-1]


@pytest.mark.parametrize("name", pickles())
def test_an_index_of_a_few_bytes_takes_neither_memory_nor_time(
    shards: StateShards, name: str
) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    content = pickles()[name]
    assert len(content) < 1000
    (shards.folder / ".metadata").write_bytes(content)
    with pytest.raises(InputError, match=r"6: not a complete checkpoint"):
        shards.shapes()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10  # KiB


@pytest.mark.parametrize("kind", ["tuples", "list", "long path", "number", "null"])
def test_a_place_that_is_no_name_is_not_spelled_out(shards: StateShards, kind: str) -> None:
    values = {"tuples": deep(60), "list": [deep(60)], "long path": "../x" * 10_000, "number": 5}
    value = values.get(kind)
    path = shards.folder / ".metadata"
    found = pickle.loads(path.read_bytes())
    for place in found.storage_data.values():
        place.relative_path = value
    path.write_bytes(pickle.dumps(found))
    with pytest.raises(InputError, match="is not the name of a file beside it") as caught:
        shards.shapes()
    assert len(str(caught.value)) < 1000


def test_shapes_that_the_files_cannot_fill(shards: StateShards) -> None:
    """Read whole, they would be allocated first."""
    path = shards.folder / ".metadata"
    found = pickle.loads(path.read_bytes())
    entry = found.state_dict_metadata["parameter.x"]
    entry.size = entry.chunks[0].sizes = torch.Size([1 << 20, 1 << 20])
    path.write_bytes(pickle.dumps(found))
    with pytest.raises(InputError, match=r"distcp: is too short for parameter.x"):
        shards.read_whole(TENSORS)
    entry.size = torch.Size([4, 1000, 3])
    entry.chunks = [
        ChunkStorageMetadata(torch.Size([0, i, 0]), torch.Size([4, 1, 3])) for i in range(1000)
    ]
    [(key, place)] = found.storage_data.items()
    place.offset = 0
    found.storage_data = {MetadataIndex(key.fqn, c.offsets): place for c in entry.chunks}
    path.write_bytes(pickle.dumps(found))
    with pytest.raises(InputError, match=r"distcp: is too short for parameter.x"):
        shards.read_whole(TENSORS)


def test_a_shard_that_is_a_pipe_is_not_waited_for(shards: StateShards) -> None:
    [shard] = shards.folder.glob("*.distcp")
    shard.unlink()
    os.mkfifo(shard)
    with pytest.raises(InputError, match="is no regular file"):
        shards.read_whole(TENSORS)
    shard.unlink()
    with pytest.raises(InputError, match="put back what is missing"):
        shards.read_whole(TENSORS)
    (shards.folder / "state.json").unlink()
    os.mkfifo(shards.folder / "state.json")
    with pytest.raises(InputError, match="no regular file"):
        shards.metadata()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int32])
def test_another_type_than_float32_is_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in TENSORS.items()}
    SingleFile(tmp_path).write(STATE._replace(tensors=tensors))
    with pytest.raises(InputError, match=r"parameter.x is stored as .*, and a training state is"):
        SingleFile(tmp_path).shapes()
    with warnings.catch_warnings(action="ignore"):
        StateShards(tmp_path).write(tensors, alone=True)
    with pytest.raises(InputError, match=r"parameter.x is stored as .*, and a training state is"):
        StateShards(tmp_path).shapes()
