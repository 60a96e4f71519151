"""The command llama-parity: any folder, its own flags beside pytest's, reports, bad input."""

import json
import re
from pathlib import Path

import pytest

from ..conformance.config_keys import KEYS
from ..plugins.expectations import known_checks
from ..support.jobs import Job
from ..support.port_folders import HOSTILE, QUICK, in_folder
from .conftest import Run

WITH_BUG = in_folder(
    *("test", "mine:SmallWithTiledHeads", *QUICK, "--xfails-file", "xfails.txt"),
    *("--report", "report.json", "--junitxml", "junit.xml"),
)
SKIPPED = in_folder(
    *("test", "mine:SmallWithTiledHeads", *QUICK, "--no-basic", "--skips-file", "every.txt"),
    *("--report", "report.json"),
)
UNCOVERED = in_folder("test", "mine:SmallWithTiledHeads", *QUICK, "--check", "test_packing")
INTERRUPTED = in_folder(
    *("test", "mine:Interrupted", *QUICK, "--no-basic", "--report", "report.json")
)
KEYS_IN_TWO = in_folder(
    *("test", "parity_tests.suite.toy_loaders:Reader", "--profile", "quick", "-n", "2"),
    *("--check", "test_key_of_config_json*", "--report", "report.json"),
)
HELP = Job(
    lambda _: (
        "-c",
        "import sys; sys.modules.update(numpy=None, torch=None, pytest=None)\n"
        "from llama_parity.command.main import main\n"
        "assert main(['--help']) == main([]) == main(['test', '--help']) == 0\n"
        "assert main(['compere']) == main(['x' * 50]) == 2\n",
    )
)


def test_a_bug_is_red_in_a_folder_whose_own_settings_are_broken() -> None:
    done = WITH_BUG.done()
    assert done.returncode == 1, done.stdout + done.stderr
    last = done.stdout.splitlines()
    assert re.search(r"1 failed, \d+ skipped, 3 xfailed", last[-1])
    (failed,) = (line for line in last if line.startswith("FAILED"))
    assert failed.startswith("FAILED mine:SmallWithTiledHeads test_causal_logits: logits: ")
    assert "expected failure: mine:SmallWithTiledHeads test_logits: tiled" in last
    assert "equals     the known bug kv_heads_tiled" in done.stdout
    compare = "llama-parity compare tiny-llama --against mine:SmallWithTiledHeads --dtype float64"
    assert compare in last
    kept = {path.name for path in WITH_BUG.folder.iterdir()} - {"__pycache__"}
    assert kept == {*HOSTILE, "report.json", "junit.xml", "cache"}
    again = next(line for line in last if line.startswith("again "))
    assert "llama-parity test mine:SmallWithTiledHeads --check test_causal_logits" in again


def test_the_report_has_every_check() -> None:
    WITH_BUG.done()
    report = json.loads((WITH_BUG.folder / "report.json").read_text())
    assert (report["schema"], report["verdict"], report["profile"]) == (1, "failed", "quick")
    assert {"numpy", "python", "llama-parity"} <= set(report["versions"])
    (backend,) = report["backends"]
    assert (backend["name"], backend["version"]) == ("mine:SmallWithTiledHeads", "1.2")
    assert backend["limits"]["rope_types"] == ["default"]
    assert backend["adapter"][0]["kind"] == "n_kv_heads"
    checks = {check["id"]: check for check in backend["checks"]}
    assert list(checks) == sorted(known_checks())
    failed = checks["test_causal_logits"]
    assert (failed["verdict"], failed["precision"]) == ("failed", "float64")
    assert failed["compared"] > 0
    assert failed["worst_share"] > 1
    assert failed["failure"]["equals"][0].startswith("the known bug kv_heads_tiled")
    assert "n_kv_heads=" in failed["failure"]["config"]
    assert "--reproduce" in failed["failure"]["again"][0]
    assert checks["test_logits"]["verdict"] == "expected failure"
    assert checks["test_logits"]["reason"] == "tiled"
    assert checks["test_packing"]["verdict"] == "not covered"
    assert checks["test_packing"]["outside_limits"] == ["masks = causal"]


def test_a_run_in_which_nothing_was_compared_does_not_pass() -> None:
    done = SKIPPED.done()
    assert done.returncode == 1, done.stdout + done.stderr
    sentence = "FAILED mine:SmallWithTiledHeads: nothing was compared (for now)"
    assert sentence in done.stdout.splitlines()
    report = json.loads((SKIPPED.folder / "report.json").read_text())
    assert (report["verdict"], report["too_few"]) == ("failed", [sentence])
    done = UNCOVERED.done()
    assert done.returncode == 1, done.stdout + done.stderr
    assert "nothing was compared (not covered, by limit: masks = causal)" in done.stdout


def test_a_key_of_config_json_is_counted_once_in_several_processes() -> None:
    pytest.importorskip("xdist")
    done = KEYS_IN_TWO.done()
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((KEYS_IN_TWO.folder / "report.json").read_text())
    checks = [check for check in report["backends"][0]["checks"] if "_key_of_" in check["id"]]
    assert [check["compared"] for check in checks] == [1] * len(KEYS)
    assert f"key_of_config_json {len(KEYS):>11} compared" in done.stdout


def test_ctrl_c_is_one_word_and_the_report_is_written() -> None:
    done = INTERRUPTED.done()
    assert done.returncode == 130
    assert done.stderr.splitlines()[-1] == "interrupted"
    assert "KeyboardInterrupt" not in done.stdout + done.stderr
    report = json.loads((INTERRUPTED.folder / "report.json").read_text())
    assert report["verdict"] == "incomplete"
    verdicts = [check["verdict"] for check in report["backends"][0]["checks"]]
    assert verdicts == ["incomplete"]


def test_help_imports_nothing_slow() -> None:
    done = HELP.done()
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("usage: llama-parity COMMAND") == 2
    near, far = done.stderr.splitlines()
    assert near == "error: compere: no such command; did you mean compare?"
    assert far.endswith("give one of test, compare, convert, vectors")


NUMPY = "parity_tests.suite.toy_ports:"


def test_a_module_that_lacks_another_names_it(run: Run, tmp_path: Path) -> None:
    (tmp_path / "needs_more.py").write_text("import not_installed_here\n")
    code, _, err = run("needs_more:Port")
    assert code == 2
    assert "install not_installed_here, which it needs, into this environment" in err


def test_the_adapter_alone_is_checked_first(run: Run, tmp_path: Path) -> None:
    assert run("--basic", f"{NUMPY}Small")[:2] == (
        0,
        f"adapter {NUMPY}Small: arrays, shapes, order and sizes are right\n",
    )
    code, out, _ = run(f"{NUMPY}Refusing", "--report", "report.json")
    assert code == 1
    assert f"adapter {NUMPY}Refusing: logits: logits raised NotImplementedError" in out
    assert "the suite was not run" in out
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["verdict"] == "failed"
    assert report["backends"][0]["adapter"][0]["kind"] == "logits"


def test_an_adapter_of_directories_alone_is_left_to_the_suite(run: Run, tmp_path: Path) -> None:
    (tmp_path / "mine_of.py").write_text(HOSTILE["mine.py"])
    with pytest.warns(DeprecationWarning, match="old"):
        code, out, _ = run("mine_of:OfDirectories", "--basic")
    assert code == 0
    assert "has no method logits to check" in out


def test_the_checks_are_listed_by_their_short_ids(run: Run) -> None:
    code, out, _ = run("--list")
    assert code == 0
    assert out.splitlines() == known_checks()
    assert {"test_logits", "test_logits_in[float32]", "test_training[3]"} <= set(out.splitlines())


BODY = """\
        from parity_tests.suite.toy_ports import Small
        return Small().logits(config, params, tokens, positions, mask)
"""


def test_a_new_port_is_short_and_right_once_logits_are_filled_in(run: Run, tmp_path: Path) -> None:
    code, out, _ = run("--new", "port.py")
    assert code == 0
    assert "llama-parity test port.py:Port" in out
    text = (tmp_path / "port.py").read_text()
    lines = [line.strip() for line in text.split('"""')[2::2] for line in line.splitlines()]
    assert len([line for line in lines if line and not line.startswith("#")]) < 30
    code, _, err = run("--new", "port.py")
    assert (code, (tmp_path / "port.py").read_text()) == (2, text)
    assert "exists already" in err
    code, out, _ = run("port.py:Port")
    assert code == 1
    assert "logits are required, and none were computed" in out
    filled = text.partition("        # NumPy:")[0] + BODY
    (tmp_path / "filled.py").write_text(filled)
    assert run("filled.py:Port", "--basic")[:2] == (
        0,
        "adapter filled.py:Port: arrays, shapes, order and sizes are right\n",
    )
