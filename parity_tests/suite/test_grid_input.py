"""What the grid's page is made of, where it is damaged, edited or not there."""

import json
from pathlib import Path
from typing import Any

import pytest

from llama_common.errors import InputError

from ..grid import __main__ as grid
from ..grid.causes import Cause, read_causes
from ..grid.cells import COLUMNS, State, cell, without_cause, without_red
from ..grid.results import RESULTS, read_results

NAME = "ibm_fms"
CAUSE = '[[cause]]\nport = "x"\nchecks = ["a"]\nseen = "b"\ntitle = "It"\nwords = "w"\ncode = "c"\n'


def result() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / f"{NAME}.json").read_text())
    return found


def column(title: str) -> Any:
    return next(one for one in COLUMNS if one.title == title)


def test_each_damage_of_a_result_is_one_line_with_its_file_and_its_key(tmp_path: Path) -> None:
    file = tmp_path / f"{NAME}.json"
    for place, keys in (
        (lambda r: r, ("name", "title", "requires", "versions", "runs", "date")),
        (lambda r: r["runs"]["Port"], ("checks", "compared", "dtypes", "limits", "processor")),
        (lambda r: r["runs"]["Port"]["checks"][0], ("id", "verdict", "worst_share", "failure")),
    ):
        for key in keys:
            for value in (None, [3], 3):
                found = result()
                if key in ("worst_share", "failure") and value is None:
                    del place(found)[key]
                elif not (key in ("compared", "worst_share") and value == 3):
                    place(found)[key] = value
                else:
                    continue
                if value == [3] and key in ("requires", "dtypes", "processor"):
                    continue
                file.write_text(json.dumps(found))
                with pytest.raises(InputError, match=f"{NAME}.json: .*; write it again: python"):
                    read_results(tmp_path)


def test_a_result_under_another_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / "copy.json").write_text(json.dumps(result()))
    with pytest.raises(InputError, match="copy.json: is the result of ibm_fms; name it so"):
        read_results(tmp_path)


def test_no_results_leave_the_pages_as_they_are(
    tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr(grid.page, "write", lambda *_: pytest.fail("written"))
    assert grid.main(["page", "--results", str(tmp_path)]) == 2
    assert f"{tmp_path}: no result in it" in capsys.readouterr().err
    assert grid.main(["page", NAME]) == 2
    assert f"page {NAME}: it is written of all results" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changed", "to", "message"),
    [
        ('port = "x"\n', "", "It: port: give a text"),
        ('checks = ["a"]', 'checks = "test_*"', "It: checks: give a list of patterns"),
        ('checks = ["a"]', "checks = []", "It: checks: give a list of patterns"),
        ('seen = "b"\n', "", "It: seen: give a text"),
        ('seen = "b"', 'seen = "("', "It: seen: missing"),
        ('words = "w"\n', "", "It: words: give a text"),
        ("[[cause]]", "[cause]", "begin each with"),
        ('code = "c"', "repeat = 3", "It: repeat: give a text"),
        ('code = "c"', 'repeat = "../README.md"', "no such file in findings/"),
        ('"w"', '"\\u00e9"', "is no list of causes"),
    ],
)
def test_each_damage_of_a_cause_is_named(
    tmp_path: Path, changed: str, to: str, message: str
) -> None:
    encoded = CAUSE.replace(changed, to.replace("\\u00e9", "\u00e9"))
    (tmp_path / "x.toml").write_text(encoded, encoding="latin-1")
    with pytest.raises(InputError, match=message):
        read_causes(tmp_path)


def test_a_backend_that_did_not_end_is_not_hidden_by_one_that_did() -> None:
    found = result()
    assert cell(found, column("float32"), []).state is State.PASSED
    found["runs"]["Other"] = {"error": "ended by SIGSEGV", "checks": [], "seconds": 1.0}
    assert cell(found, column("float32"), []).state is State.NOT_RUN
    assert cell(found, column("logits"), []).state is State.UNCONFIRMED


def test_a_red_cell_without_a_cause_and_a_cause_without_a_red_cell_are_told() -> None:
    cause = Cause(NAME, ("test_logits", "test_causal_logits"), ".*", "It", "", code="pass")
    assert list(without_red([result()], [cause])) == [
        f"{NAME}: test_causal_logits: no check is red by it (It)"
    ]
    told = list(without_cause([result()], [cause]))
    assert f"{NAME}: packing: red without a cause" in told
    assert f"{NAME}: logits: red without a cause" not in told


def test_each_pattern_of_a_cause_has_a_red_check() -> None:
    assert not list(without_red(read_results(RESULTS), read_causes()))
