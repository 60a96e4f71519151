"""convert.py: names of files where a directory is written, and an environment without PyTorch."""

import sys
from pathlib import Path

import pytest

from llama_parity import convert

from ..support.jobs import Job
from ..support.meta_checkpoints import an_hf

PROGRAM = """
import sys
from importlib.machinery import PathFinder
find = PathFinder.find_spec
PathFinder.find_spec = lambda name, *rest: None if name == "torch" else find(name, *rest)
from llama_parity.command.main import main
try:
    main(["convert", "--help"])
except SystemExit as end:
    assert not end.code
assert [main(["convert", *line.split()]) for line in sys.argv[1:]] == [2] * 4
"""
WITHOUT_TORCH = Job(
    lambda folder: (
        *("-c", PROGRAM, "", "nothing out"),
        *(f"{an_hf(folder / 'a')} {folder / 'b'} --shards 0", f"{folder / 'a'} {folder / 'b'}"),
    )
)


def test_without_torch_the_help_and_wrong_input_come_first() -> None:
    done = WITHOUT_TORCH.done()
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: llama-parity convert SRC DST [FLAGS]")
    assert done.stderr.splitlines() == [
        "error: SRC and DST: required; see --help",
        "error: nothing: no such file; give a model directory or a .safetensors file",
        "error: --shards must lie between 1 and 99, got 0; see --help",
        "error: convert needs PyTorch: pip install 'llama-parity[torch]'",
    ]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("x.ggf", "as its name ends in .ggf; did you mean .gguf? --to meta writes one so named"),
        ("x.GUFF", "did you mean .gguf?"),
        ("x.safetensors", "and .safetensors is a file's ending; --to meta writes one so named"),
        ("x.pth", ".pth is a file's ending"),
    ],
)
def test_a_file_s_name_is_no_directory_s(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, message: str
) -> None:
    source, target = an_hf(tmp_path / "a"), tmp_path / name
    assert convert.main([str(source), str(target)]) == 2
    error = capsys.readouterr().err
    assert f"{target}: would be a directory" in error
    assert message in error
    assert error.count("\n") == 1
    assert not target.exists()
    assert convert.main([str(source), str(target), "--to", "meta"]) == 0
    assert target.is_dir()


@pytest.mark.parametrize("name", ["Llama-3.2-1B", "v1.0", "llama.hf", "x.meta"])
def test_a_directory_may_have_a_dot_in_its_name(tmp_path: Path, name: str) -> None:
    assert convert.main([str(an_hf(tmp_path / "a")), str(tmp_path / name)]) == 0


def test_the_package_for_gguf_files_is_named_by_its_extra(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert convert.main([str(an_hf(tmp_path / "a")), str(tmp_path / "b.gguf")]) == 2
    error = capsys.readouterr().err
    assert error == "error: writing a GGUF file needs gguf: pip install 'llama-parity[gguf]'\n"
