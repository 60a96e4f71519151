"""The grid of public packages: what it reads, runs, and says in its page."""

import json
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from llama_common.errors import InputError

from ..conformance.config_keys import ALSO_PLAIN, KEYS
from ..grid import __main__ as grid
from ..grid import markdown, page, running
from ..grid.causes import Cause, read_causes
from ..grid.cells import COLUMNS, State, cell
from ..grid.environments import InstallError
from ..grid.recorders import Recorder, all_recorders, chosen
from ..grid.results import RESULTS, read_results
from ..plugins.expectations import known_checks

DOCS = Path(__file__).parent.parent.parent / "docs"
TOY = Recorder("toy", "A toy", ("toy==1.0",), ("Port", "Directory"))
CHECK = {
    "id": "test_logits",
    "verdict": "passed",
    "compared": 5,
    "worst_share": 0.25,
    "not_covered": {},
    "outside_limits": [],
    "documented": {},
    "failure": None,
}
CAUSE = Cause(
    "toy:Port", ("test_logits_in[*",), ".*", "It rounds", "It rounds & more.", code="pass"
)


def result(*checks: dict[str, Any], **run: Any) -> dict[str, Any]:
    """Return the result of a package with one backend of these checks."""
    about = {"dtypes": ["float32"], "limits": {}, "processor": ["a processor"], "seconds": 1.0}
    compared = sum(check["compared"] for check in checks)
    checked = {"verdict": "passed", "compared": compared, "checks": list(checks)}
    return {
        "schema": 1,
        "name": "toy",
        "title": "A toy",
        "requires": ["toy==1.0"],
        "versions": {"toy": "1.0"},
        "date": "2026-11-28",
        "runs": {"Port": about | checked | run},
    }


def column(title: str) -> Any:
    return next(one for one in COLUMNS if one.title == title)


def test_every_check_of_the_suite_is_in_one_column() -> None:
    for check in known_checks():
        assert len([one for one in COLUMNS if one.has({"id": check})]) == 1, check


@pytest.mark.parametrize(
    ("change", "state"),
    [
        ({}, State.PASSED),
        ({"documented": {"float32 angles": 3}}, State.DOCUMENTED),
        ({"verdict": "not covered", "compared": 0}, State.NOT_COVERED),
        ({"verdict": "incomplete"}, State.NOT_RUN),
        ({"verdict": "failed"}, State.UNCONFIRMED),
    ],
)
def test_the_state_of_a_cell_is_that_of_its_worst_check(change: Any, state: State) -> None:
    other = CHECK | {"id": "test_causal_logits"}
    assert cell(result(CHECK | change), column("logits"), [CAUSE]).state is state
    both = cell(result(other, CHECK | change), column("logits"), [CAUSE])
    assert both.state is (State.PASSED if state is State.NOT_COVERED else state)


def test_a_red_cell_is_confirmed_by_its_cause_alone() -> None:
    red = result(CHECK | {"id": "test_logits_in[float32]", "verdict": "failed"})
    assert cell(red, column("float32"), [CAUSE]).state is State.FAILED
    others = [
        Cause("toy:Directory", CAUSE.checks, ".*", "", ""),
        Cause("toys", CAUSE.checks, ".*", "", ""),
        Cause("toy", ("test_logits_in[float16]",), ".*", "", ""),
    ]
    assert cell(red, column("float32"), others).state is State.UNCONFIRMED


def test_a_run_that_was_cut_short_is_not_taken_for_limits() -> None:
    assert cell(result(over="the time limit"), column("logits"), []).state is State.NOT_RUN
    assert cell(result(), column("logits"), []).state is State.NOT_COVERED


class Reader(HTMLParser):
    """Notes ids, links, and text of a page; every element must be closed."""

    VOID = ("meta", "link", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: set[str] = set()
        self.links: set[str] = set()
        self.cells: list[dict[str, str | None]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        about = dict(attrs)
        if tag not in self.VOID:
            self.open.append(tag)
        self.ids.add(about.get("id") or "")
        if tag == "a":
            self.links.add(about["href"] or "")
        if tag == "td":
            self.cells.append(about)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_links_each_red_cell_to_its_cause_and_escapes_what_it_shows(
    tmp_path: Path,
) -> None:
    failure = {"message": "logits: 3 < 4 times", "config": "dim=2"}
    failed = CHECK | {"id": "test_logits_in[float32]", "verdict": "failed", "failure": failure}
    gone = {
        "schema": 1, "name": "gone", "title": "Gone", "requires": ["gone==2"],
        "not_run": "no wheel <here>", "versions": {}, "runs": {},
    }  # fmt: skip
    page.write([result(CHECK, failed), gone], [CAUSE], tmp_path)
    text = (tmp_path / "grid.html").read_text()
    read = Reader(text)
    assert not read.open
    assert {link.removeprefix("#") for link in read.links} <= read.ids
    assert f"#{CAUSE.anchor}" in read.links
    assert len(read.cells) == len(COLUMNS)
    assert "largest error 0.25 of its tolerance" in (read.cells[0]["title"] or "")
    assert "logits: 3 &lt; 4 times" in text
    assert "no wheel &lt;here&gt;" in text
    assert "It rounds &amp; more." in text
    assert "http" not in text
    table = (tmp_path / "grid.md").read_text()
    assert "| toy 1.0 | ✓ | [✗](#it-rounds) |" in table
    assert "### It rounds" in table
    assert "| gone | no wheel <here> |" in table


def test_the_pages_in_docs_are_those_of_the_results(tmp_path: Path) -> None:
    page.write(read_results(RESULTS), read_causes(), tmp_path)
    for name in ("grid.md", "grid.html"):
        assert (tmp_path / name).read_text() == (DOCS / name).read_text(), (
            "python -m parity_tests.grid page writes it"
        )


def test_each_result_is_of_the_packages_that_its_port_pins() -> None:
    pinned = {one.name: [*one.requires, *one.npm] for one in all_recorders()}
    for found in read_results(RESULTS):
        assert found["requires"] == pinned[found["name"]]


def test_every_port_is_read_from_its_source() -> None:
    recorders = {one.name: one for one in all_recorders()}
    files = {path.stem for path in (DOCS.parent / "parity_tests" / "ports").glob("[a-z]*.py")}
    assert set(recorders) <= files
    assert recorders["mlx_lm"].requires == ("mlx-lm==0.32.2", "mlx[cpu]==0.32.4")
    assert recorders["mlx_lm"].objects == ("Port", "Directory")
    for one in recorders.values():
        assert one.objects, one.name
    with pytest.raises(InputError, match="mlx-lm: no such port in parity_tests/ports; did you me"):
        chosen(["mlx-lm"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cause = 1 2", "is no list of causes"),
        ('[[cause]]\nport = "x"\nwhy = ""', "why: no key of a cause"),
        (
            '[[cause]]\nport = "x"\nchecks = []\nrepeat = "no.sh"',
            "no.sh: no such file in findings/",
        ),
        ('[[cause]]\nport = "x"\nchecks = []\ntitle = "It"', "It: give repeat or code"),
    ],
)
def test_a_cause_that_confirms_nothing_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "x.toml").write_text(text)
    with pytest.raises(InputError, match=message):
        read_causes(tmp_path)


Run = Callable[..., int]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Run the grid on toys of the suite itself in place of ports, without an installation."""
    monkeypatch.setattr(running, "PORTS", "parity_tests.suite")

    def call(recorders: list[Recorder], *argv: str) -> int:
        monkeypatch.setattr(grid, "chosen", lambda names: recorders)
        return grid.main(["run", "--results", str(tmp_path), *argv])

    return call


READER = Recorder("toy_loaders", "A reader", ("numpy",), ("Reader", "FixedEpsilon"))
SMALL = Recorder("toy_loaders", "Epsilon 1e-6", ("numpy",), ("FixedSmallEpsilon",))


def test_a_run_writes_what_each_backend_was_found_to_do(run: Run, tmp_path: Path) -> None:
    assert run([READER], "--python", sys.executable) == 0
    found = json.loads((tmp_path / "toy_loaders.json").read_text())
    assert {name: one["verdict"] for name, one in found["runs"].items()} == {
        "Reader": "passed",
        "FixedEpsilon": "failed",
    }
    epsilon = cell(found, column("epsilon"), [])
    assert (epsilon.state, epsilon.compared) == (State.UNCONFIRMED, 4)
    assert {backend for backend, *_ in epsilon.reds} == {"FixedEpsilon"}
    assert found["runs"]["Reader"]["compared"] >= 40 + len(KEYS)
    assert str(running.ROOT) not in (tmp_path / "toy_loaders.json").read_text()
    assert cell(found, column("padding"), []).state is State.NOT_COVERED


def test_a_fault_of_every_directory_hides_the_other_keys(run: Run, tmp_path: Path) -> None:
    assert run([SMALL], "--python", sys.executable) == 0
    (found,) = read_results(tmp_path)
    cause = Cause(
        "toy_loaders", ("test_key_of_config_json[rms_norm_eps*",), ".*", "", "", code="pass"
    )
    assert cell(found, column("epsilon"), [cause]).state is State.FAILED
    llama3 = cell(found, column("llama3"), [cause])
    assert llama3.state is State.PASSED
    assert "read rightly; the logits are those with rms_norm_eps 1e-06" in llama3.notes
    assert cell(found, column("loader"), [cause]).state is State.UNCONFIRMED


def test_a_key_that_fails_like_a_plain_directory_is_hidden() -> None:
    message = f"config.json: x: 3 times its tolerance{ALSO_PLAIN}"
    hidden = CHECK | {"id": "test_key_of_config_json[rms_norm_eps (transformers 4)]"}
    hidden |= {"verdict": "failed", "failure": {"message": message}}
    assert cell(result(hidden), column("epsilon"), []).state is State.HIDDEN


def test_a_run_over_its_limit_and_one_that_fails_to_begin_stop_no_other(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    slow = Recorder("toy_ports", "Slow", ("numpy",), ("Small",), minutes=0.002)
    lost = Recorder("no_such_module", "Lost", ("numpy",), ("Port",))
    assert run([slow, lost, TOY], "--python", sys.executable) == 0
    out = capsys.readouterr().out
    assert "stopped by the time limit of 0.002 minutes" in out
    assert "No module named" in out

    def refuse(*_: Any) -> Any:
        raise InstallError("no wheel for this Python")

    monkeypatch.setattr(grid, "run_recorder", refuse)
    assert run([TOY]) == 0
    found = read_results(tmp_path)
    assert {one["name"]: one.get("not_run") for one in found} == {
        "no_such_module": None,
        "toy": "no wheel for this Python",
        "toy_ports": None,
    }
    assert "no wheel for this Python" in markdown.document([], [found[1]], [])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["walk"], "walk: no such action; give run or page"),
        (["run", "nothing_here"], "nothing_here: no such port"),
        (["run", "--profile", "all"], "--profile all: give quick, default or thorough"),
        (["page", "--results", "no/folder"], "no/folder: no such folder"),
    ],
)
def test_bad_input_is_one_line(capsys: Any, argv: list[str], message: str) -> None:
    assert grid.main(argv) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err
