"""A run directory from elsewhere: none of its files runs code when a run is resumed or exported.

The probe is harmless: unpickled, it makes an empty folder.
"""

import errno
import io
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from llama_torch import export, train
from llama_torch.checkpoint import hf, step_folders
from llama_torch.checkpoint.file_names import MODEL_FILE

from ..support.checkpoints import to_shards
from ..support.survival import require_same, resume

NAME = "parameter.model.norm.weight"


class Probe:
    """Unpickled, it makes a directory."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.path,)


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "ran"


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    """Return a copy of a run whose newest checkpoint but one, the newest now, is in shards."""
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    shutil.rmtree(step_folders.newest(out))
    to_shards(step_folders.newest(out))
    return out


def commands(run: Path, to: Path) -> list[Callable[[], int]]:
    return [
        lambda: train.main(["--resume", "--out", str(run)]),
        lambda: export.main([str(run), "--to", str(to)]),
    ]


def require_refused(
    run: Path, marker: Path, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both commands end in one line that holds ``message``, and no probe has run."""
    to = marker.parent / "exported"
    before = sorted(path for path in run.rglob("*"))
    for command in commands(run, to):
        capsys.readouterr()
        assert command() == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1, error
        assert error.startswith("error: "), error
        assert message in error, error
        assert not marker.exists()
        assert not to.exists()
    assert sorted(path for path in run.rglob("*")) == before


def index(run: Path) -> Metadata:
    found: Metadata = pickle.loads((step_folders.newest(run) / ".metadata").read_bytes())
    return found


def change(run: Path, changed: object, protocol: int = 4) -> None:
    (step_folders.newest(run) / ".metadata").write_bytes(pickle.dumps(changed, protocol))


def test_shards_resume_and_export(whole: Path, run: Path, tmp_path: Path) -> None:
    exported = tmp_path / "exported"
    assert export.main([str(run), "--to", str(exported)]) == 0
    assert resume(run) == 0
    require_same(whole, run)
    assert load_file(exported / MODEL_FILE).keys() == load_file(run / MODEL_FILE).keys()


def test_the_probe_works(tmp_path: Path, marker: Path) -> None:
    pickle.loads(pickle.dumps(Probe(marker)))
    assert marker.is_dir()


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_an_index_that_is_a_program(
    protocol: int, run: Path, marker: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change(run, Probe(marker), protocol)
    require_refused(run, marker, "mkdir, which is no part of a checkpoint", capsys)


@pytest.mark.parametrize("place", ["planner_data", "storage_meta", "storage_data", "extra"])
def test_an_index_that_holds_a_program(
    place: str, run: Path, marker: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = index(run)
    setattr(changed, place, {"x": Probe(marker)})
    change(run, changed)
    require_refused(run, marker, "names posix.mkdir", capsys)


def test_a_program_for_one_process(
    run: Path, marker: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Torch falls back to an index of the process's own."""
    folder = step_folders.newest(run)
    (folder / ".metadata").write_bytes(b"damaged")
    (folder / "__0.metadata").write_bytes(pickle.dumps(Probe(marker)))
    require_refused(run, marker, "not a complete checkpoint", capsys)


def test_an_entry_that_is_no_tensor(
    run: Path, marker: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Torch unpickles such an entry from the shard."""
    changed, folder = index(run), step_folders.newest(run)
    [(key, place)] = [(k, p) for k, p in changed.storage_data.items() if k.fqn == NAME]
    content = io.BytesIO()
    torch.save(Probe(marker), content)
    (folder / "more.distcp").write_bytes(content.getvalue())
    place.relative_path, place.offset, place.length = "more.distcp", 0, len(content.getvalue())
    changed.storage_data[type(key)(NAME)] = place
    changed.state_dict_metadata[NAME] = BytesStorageMetadata()
    change(run, changed)
    require_refused(run, marker, "BytesStorageMetadata, which is no part", capsys)


def test_a_shard_that_is_a_program(
    run: Path, marker: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed, folder = index(run), step_folders.newest(run)
    content = io.BytesIO()
    torch.save(Probe(marker), content)
    (folder / "more.distcp").write_bytes(content.getvalue())
    for place in changed.storage_data.values():
        place.relative_path, place.offset, place.length = "more.distcp", 0, len(content.getvalue())
    change(run, changed)
    require_refused(run, marker, "not a complete checkpoint", capsys)


def _elsewhere(found: Metadata) -> None:
    for place in found.storage_data.values():
        place.relative_path = f"../{place.relative_path}"


def _compressed(found: Metadata) -> None:
    for place in found.storage_data.values():
        place.transform_descriptors = ["stream.zstd/1"]


def _uncovered(found: Metadata) -> None:
    found.state_dict_metadata[NAME].chunks = []


def _outside(found: Metadata) -> None:
    [chunk] = found.state_dict_metadata[NAME].chunks
    chunk.offsets = torch.Size([1])


def _placeless(found: Metadata) -> None:
    found.storage_data = {k: v for k, v in found.storage_data.items() if k.fqn != NAME}


def _huge(found: Metadata) -> None:
    entry = found.state_dict_metadata[NAME]
    entry.size = entry.chunks[0].sizes = torch.Size([1 << 60])


def _tables(found: Metadata) -> None:
    found.state_dict_metadata = 5  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_elsewhere, "'../__0_0.distcp' is not the name of a file"),
        (_compressed, "compressed"),
        (_uncovered, f"{NAME} is not covered"),
        (_outside, f"a part of {NAME} lies outside"),
        (_placeless, f"no place for a part of {NAME}"),
        (_huge, "model.norm.weight is [1152921504606846976] and should be [4]"),
        (_tables, "not a complete checkpoint"),
    ],
)
def test_an_index_that_is_wrong(
    damage: Callable[[Metadata], None],
    message: str,
    run: Path,
    marker: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    changed = index(run)
    damage(changed)
    change(run, changed)
    require_refused(run, marker, message, capsys)


def test_a_failed_export_leaves_nothing(
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "empty").mkdir()
    before = sorted(tmp_path.rglob("*"))
    for to in ("new", "below/another/new", "empty"):
        with monkeypatch.context() as patch:
            patch.setattr(hf, "save_file", full)
            assert export.main([str(run), "--to", str(tmp_path / to)]) == 2
        assert "No space left" in capsys.readouterr().err
        assert sorted(tmp_path.rglob("*")) == before
    for to in ("new", "below/another/new", "empty"):
        assert export.main([str(run), "--to", str(tmp_path / to)]) == 0
        found = {path.name for path in (tmp_path / to).iterdir()}
        assert found == {MODEL_FILE, "config.json", "tokenizer.json", "tokenizer_config.json"}
