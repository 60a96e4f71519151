"""How an implementation is named: the module or file that is meant, and no other, is imported."""

import sys
from pathlib import Path
from types import ModuleType

import pytest

from llama_parity.command.main import main
from reference_np import backend
from reference_np.config import InputError

from ..support.jobs import Command, Job
from ..support.port_folders import QUICK
from .conftest import Run

GOOD = "from parity_tests.suite.toy_ports import Small as Port\n"
OTHER = "from parity_tests.suite.toy_ports import Refusing as Port\n"
RIGHT = "arrays, shapes, order and sizes are right"


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def refusal(result: tuple[int, str, str]) -> str:
    """Return the one line of a refused command."""
    code, out, err = result
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


def test_a_file_is_tested_and_not_one_of_its_name_in_the_current_folder(
    run: Run, tmp_path: Path
) -> None:
    write(tmp_path / "twin.py", OTHER)
    write(tmp_path / "other" / "twin.py", f"import beside\n{GOOD}")
    write(tmp_path / "other" / "beside.py", "")
    write(tmp_path / "beside.py", "raise RuntimeError('that of the current folder')")
    code, out, _ = run("other/twin.py:Port", "--basic")
    assert (code, out) == (0, f"adapter other/twin.py:Port: {RIGHT}\n")
    assert "module has the name twin" in refusal(run("twin.py:Port", "--basic"))
    assert "is imported in place of twin.py here" in refusal(run("twin:Port", "--basic"))


def test_a_file_may_lie_above_the_current_folder(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "above.py", GOOD)
    (tmp_path / "inner").mkdir()
    monkeypatch.chdir(tmp_path / "inner")
    assert run("../above.py:Port", "--basic")[0] == 0
    assert backend.module_of("../above.py:Port").__file__ == str(tmp_path / "above.py")


def test_a_module_that_was_imported_before_is_not_taken_for_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "earlier", ModuleType("earlier"))
    file = write(tmp_path / "earlier.py", GOOD)
    with pytest.raises(InputError, match="built into Python, is imported already; give earlier.py"):
        backend.load(f"{file}:Port")


@pytest.mark.parametrize("file", ["numpy.py", "pytest.py", "reference_np.py", "random.py"])
@pytest.mark.parametrize("port", ["hidden_by:Port", "hidden_by.py:Port", "sub/hidden_by.py:Port"])
def test_a_file_that_hides_what_the_command_needs_is_named(
    run: Run, tmp_path: Path, file: str, port: str
) -> None:
    folder = tmp_path / "sub" if port.startswith("sub") else tmp_path
    write(folder / "hidden_by.py", GOOD)
    write(folder / file, "raise RuntimeError('imported')")
    told = refusal(run(port, "--basic"))
    assert f"{folder / file}: hides the installed module {file[:-3]}" in told


def test_an_environment_inside_the_folder_does_not_hide_the_hiding(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / ".venv" / "made_up.py", "")
    monkeypatch.syspath_prepend(tmp_path / ".venv")
    assert "an installed module has the name made_up" in refusal(run("--new", "made_up.py"))


def hiding(*arguments: str) -> Job:
    """Return a run of ``python -m llama_parity`` in a folder with a numpy.py."""

    def make(folder: Path) -> Command:
        write(folder / "numpy.py", "raise RuntimeError('imported')")
        return "-m", "llama_parity", *arguments

    return Job(make, in_folder=True)


LISTS = hiding("vectors", "list")


def test_python_m_does_not_search_the_current_folder_for_what_it_needs() -> None:
    done = LISTS.done()
    assert done.returncode == 0, done.stderr
    assert "basic-order" in done.stdout


def test_a_folder_that_is_searched_all_the_same_is_told_first(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "numpy.py", "raise RuntimeError('imported')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    assert main(["vectors", "list"]) == 2
    assert f"{tmp_path / 'numpy.py'}: hides the installed module numpy" in capsys.readouterr().err


def test_the_current_folder_may_have_been_removed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert main(["vectors", "list"]) == 0
    assert "basic-order" in capsys.readouterr().out


def in_another_folder() -> Job:
    def make(folder: Path) -> Command:
        text = "from parity_tests.suite.toy_ports import SmallWithTiledHeads as Tiled\n"
        write(folder / "modèle" / "tiled.py", text)
        chosen = "--check", "test_causal_logits", "--no-basic", "--report", "report.json"
        return "-m", "llama_parity", "test", "modèle/tiled.py:Tiled", *QUICK, *chosen

    return Job(make, in_folder=True)


ELSEWHERE = in_another_folder()


def test_the_commands_that_a_run_prints_name_the_file_as_it_was_given() -> None:
    done = ELSEWHERE.done()
    assert done.returncode == 1, done.stdout + done.stderr
    assert "llama-parity test 'modèle/tiled.py:Tiled' --check test_causal_logits" in done.stdout
    assert "llama-parity compare tiny-llama --against 'modèle/tiled.py:Tiled'" in done.stdout
    assert '"name": "mod\\u00e8le/tiled.py:Tiled"' in (ELSEWHERE.folder / "report.json").read_text()


def test_a_module_with_relative_imports_is_named_by_its_package(run: Run, tmp_path: Path) -> None:
    write(tmp_path / "pack" / "__init__.py", "")
    write(tmp_path / "pack" / "sub" / "__init__.py", "")
    write(tmp_path / "pack" / "sub" / "inner.py", f"from . import more\n{GOOD}")
    write(tmp_path / "pack" / "sub" / "more.py", "")
    write(tmp_path / "loose.py", f"from . import more\n{GOOD}")
    told = refusal(run("pack/sub/inner.py:Port", "--basic"))
    assert "it is a part of a package: give pack.sub.inner:Port\n" in told
    assert run("pack.sub.inner:Port", "--basic")[0] == 0
    told = refusal(run("loose.py:Port", "--basic"))
    assert "write its imports without the leading dot" in told


FAILING = """\
from parity_tests.suite.toy_ports import Small
class Needy(Small):
    def __init__(self, path):
        self.path = path
class Failing(Small):
    def __init__(self):
        self.none.nothing
class Leaving(Small):
    def __init__(self):
        raise SystemExit(0)
class Importing(Small):
    def __init__(self):
        import not_installed_here
"""


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Needy", ["its constructor failed (TypeError: ", "called without arguments"]),
        ("Failing", ["its constructor failed (AttributeError: ", "makes.py:7)"]),
        ("Leaving", ["its constructor failed (SystemExit: 0, at ", "makes.py:10)"]),
        ("Importing", ["makes.py:13)", "install not_installed_here, which it needs"]),
    ],
)
def test_an_error_of_the_constructor_is_told_as_such(
    run: Run, tmp_path: Path, name: str, words: list[str]
) -> None:
    write(tmp_path / f"{name}_makes.py", FAILING)
    told = refusal(run(f"{name}_makes.py:{name}", "--basic"))
    for word in words:
        assert word in told


def test_an_error_of_a_module_is_told_with_its_line(run: Run, tmp_path: Path) -> None:
    write(tmp_path / "divides.py", "import numpy as np\n\nnp.zeros(2).reshape(3)\n")
    told = refusal(run("divides.py:Port", "--basic"))
    assert "cannot be imported (ValueError: " in told
    assert f", at {tmp_path / 'divides.py'}:3); its module failed while it was imported" in told
    told = refusal(run("nowhere_at_all:Port", "--basic"))
    assert "(ModuleNotFoundError: No module named 'nowhere_at_all');" in told


def test_a_file_without_its_ending_or_its_object_is_answered(run: Run, tmp_path: Path) -> None:
    text = "class Mine:\n    def logits(self): ...\n"
    write(tmp_path / "sub" / "bare.py", text)
    told = refusal(run("sub/bare:Mine", "--basic"))
    assert "give sub/bare.py:Mine" in told
    assert "Python source: give sub/bare.py:Mine\n" in refusal(run("sub/bare.py", "--basic"))
    assert "did you mean sub/bare.py:Mine?" in refusal(run("sub/bare.py:Mien", "--basic"))
    assert "sub/none.py: no such file" in refusal(run("sub/none.py", "--basic"))
