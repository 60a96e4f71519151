"""The compiled step is compiled once, never read half-written, and missing without a message."""

import os
import shutil
from pathlib import Path

import pytest
import torch

from llama_torch.common import processor as processor_module
from llama_torch.common.user_cache import user_cache
from llama_torch.inference import native_library

load = native_library.load.__wrapped__  # each call as in a new process


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if native_library.load(torch.float32) is None:
        pytest.skip("no C compiler with OpenMP here")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def libraries() -> list[Path]:
    return sorted((user_cache() / "native").glob("*.so"))


def forbid(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("compiled again")

    monkeypatch.setattr(native_library, "_compile", fail)


def test_it_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load(torch.float32)
    [library] = libraries()
    assert library.stat().st_uid == os.getuid()
    assert len(list(library.parent.iterdir())) == 2  # and its checksum
    forbid(monkeypatch)
    assert load(torch.float32)
    with pytest.raises(AssertionError, match="compiled again"):
        load(torch.float64)


@pytest.mark.parametrize("fault", ["short", "changed", "no sum", "a sum of another"])
def test_a_file_that_is_not_as_it_was_compiled_is_compiled_again(fault: str) -> None:
    assert load(torch.float32)
    [library] = libraries()
    whole, sums = library.read_bytes(), library.with_suffix(".json")
    library.unlink()  # this process has it in memory
    library.write_bytes(whole)
    if fault == "short":
        library.write_bytes(whole[: len(whole) // 2])
    elif fault == "changed":
        library.write_bytes(whole[:-1] + b"?")
    elif fault == "no sum":
        sums.unlink()
    else:
        sums.write_text('{"library": "0"}')
    assert load(torch.float32)
    assert library.read_bytes() == whole


def test_a_library_that_others_may_write_to_is_compiled_again() -> None:
    mask = os.umask(0)
    try:
        assert load(torch.float32)
    finally:
        os.umask(mask)
    [library] = libraries()
    assert library.stat().st_mode & 0o777 == 0o600
    library.chmod(0o620)
    before = library.stat().st_ino
    assert load(torch.float32)
    assert (library.stat().st_ino == before, library.stat().st_mode & 0o777) == (False, 0o600)


@pytest.mark.parametrize("script", ["exit 1", "echo no >&2; exit 127", "exit 0"])
def test_a_compiler_that_fails_leaves_no_library_and_no_message(
    script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in native_library.COMPILERS:
        write_compiler(tmp_path / name, script)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert load(torch.float32) is None
    assert not libraries()
    assert capfd.readouterr() == ("", "")


def write_compiler(path: Path, script: str) -> None:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


@pytest.mark.parametrize("script", ["echo cannot find -lomp >&2; exit 1", "exit 0"])
def test_the_next_compiler_is_taken_where_one_fails(
    script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = next(filter(None, map(shutil.which, native_library.COMPILERS)))
    write_compiler(tmp_path / "cc", script)
    write_compiler(tmp_path / "gcc", f'exec {real} "$@"')
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert load(torch.float32)
    assert len(libraries()) == 1


def test_without_a_compiler_there_is_no_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert load(torch.float32) is None
    assert load(torch.float16) is None


def test_a_folder_that_others_may_write_to_is_not_used() -> None:
    folder = user_cache() / "native"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    assert load(torch.float32)
    assert not libraries()


def test_a_folder_that_cannot_be_made_is_done_without(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    assert load(torch.float32)


def test_without_a_home_it_is_compiled_for_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless(_: object) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", classmethod(homeless))
    assert load(torch.float32)


def test_a_folder_named_from_the_current_one_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A library that came with a downloaded folder would be run in it."""
    monkeypatch.setenv("XDG_CACHE_HOME", "cache")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_cache() == tmp_path / ".cache" / "llama_torch"


@pytest.mark.parametrize(
    "features", ["flags\t: fpu avx2", "Features : fp asimd", "isa : rv64imafdc"]
)
def test_machines_that_do_not_tell_their_features_have_libraries_of_their_own(
    features: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They may share the folder, and an instruction of one may end the process on another."""
    info = tmp_path / "cpuinfo"

    def names(content: str | None) -> list[str]:
        info.unlink(missing_ok=True)
        if content is not None:
            info.write_text(content)
        monkeypatch.setattr(processor_module, "CPU_INFO", info)
        found = []
        for node in ("one", "another"):
            monkeypatch.setattr(processor_module.platform, "node", lambda n=node: n)
            found.append(processor_module.processor.__wrapped__())
        return found

    one, another = names("model name : AMD EPYC\n")
    assert one != another
    one, another = names(None)
    assert one != another
    one, another = names(f"model name : AMD EPYC\n{features}\n")
    assert one == another
    assert one != names(f"model name : AMD EPYC\n{features} more\n")[0]
