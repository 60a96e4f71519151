"""What a red check of the grid is taken for: a wrong number, an error, a documented difference."""

import re
from dataclasses import replace
from typing import Any

import pytest

from ..conformance.config_keys import ALSO_PLAIN
from ..grid.causes import Cause, read_causes, said
from ..grid.cells import COLUMNS, State, cell

KEY = "test_key_of_config_json[rope_theta left out (transformers 4)]"
RAISED = "config.json: rope_theta left out: from_directory failed: KeyError: 'rope_theta'"
CAUSE = Cause("toy", ("test_*",), ".*", "", "", code="pass")


def state(cause: Cause, check: str, message: str, title: str, **failed: Any) -> State:
    """Return the state of a cell with one failed check."""
    red = {
        "id": check,
        "verdict": "failed",
        "compared": 5,
        "worst_share": failed.pop("worst_share", 0.0),
        "not_covered": {},
        "outside_limits": [],
        "documented": {},
        "failure": {"message": message, **failed},
    }
    column = next(one for one in COLUMNS if one.title == title)
    return cell({"name": "toy", "runs": {"Port": {"checks": [red]}}}, column, [cause]).state


def test_a_loader_that_stops_is_not_said_to_compute_something_else() -> None:
    assert state(CAUSE, KEY, RAISED, "base") is State.STOPPED
    assert state(CAUSE, KEY, "rope_theta is not read", "base") is State.FAILED
    assert state(CAUSE, "test_directory", "KeyError: 'x'", "loader") is State.STOPPED
    wrong = state(CAUSE, "test_directory", "KeyError: 'x'", "loader", worst_share=9.0)
    assert wrong is State.FAILED
    assert state(CAUSE, KEY, RAISED + ALSO_PLAIN, "base") is State.HIDDEN


def test_what_one_directory_hides_is_right_where_another_shows_it() -> None:
    shared = {"id": KEY, "compared": 1, "worst_share": 0.0, "not_covered": {}}
    shared |= {"outside_limits": [], "documented": {}}
    hidden = shared | {"verdict": "failed", "failure": {"message": RAISED + ALSO_PLAIN}}
    right = shared | {"verdict": "passed", "failure": None}
    column = next(one for one in COLUMNS if one.title == "base")
    for other, expected in ((right, State.PASSED), (hidden, State.HIDDEN)):
        runs = {"Directory": {"checks": [hidden]}, "Helped": {"checks": [other]}}
        assert cell({"name": "toy", "runs": runs}, column, [CAUSE]).state is expected


def test_what_a_package_documents_is_no_fault() -> None:
    documented = replace(CAUSE, documented="its manual")
    assert state(documented, KEY, "logits: 9 times", "base") is State.DOCUMENTED


@pytest.mark.parametrize(
    ("drawn", "expected"),
    [("rope_type='llama3'", State.FAILED), ("rope_type='default'", State.UNCONFIRMED)],
)
def test_a_cause_explains_only_the_drawn_examples_that_it_names(
    drawn: str, expected: State
) -> None:
    cause = replace(CAUSE, seen="rope_type='llama3'")
    found = state(cause, "test_directory", "logits: 9 times", "loader", drawn=drawn)
    assert found is expected


def test_a_cause_explains_only_the_failures_of_a_key_that_it_names() -> None:
    cause = replace(CAUSE, seen="is not read")
    assert state(cause, KEY, "rope_theta is not read", "base") is State.FAILED
    assert state(cause, KEY, "rope_theta: MemoryError", "base") is State.UNCONFIRMED


@pytest.mark.parametrize("cause", read_causes(), ids=lambda cause: cause.title)
def test_no_cause_explains_an_error_of_another_kind(cause: Cause) -> None:
    """A fault that comes beside the ones that are known must not look like them."""
    plain = "head_dim=32 (dim / n_heads = 32) rope_type=default n_kv_heads=2 rope_theta=10000 "
    call = "from_directory: config.json as transformers 4; float32; tokens [1, 32]"
    failure = {"message": "MemoryError: no memory", "config": plain, "call": call}
    assert not re.search(cause.seen, said({"failure": failure}))


def test_a_backend_of_scaled_models_alone_answers_for_scaling_alone() -> None:
    """A package that computes plain models rightly is not red in their columns."""
    failure = {"message": "logits: 9 times its tolerance"}
    plain = {"id": "test_logits", "verdict": "passed", "compared": 5, "worst_share": 0.1}
    plain |= {"not_covered": {}, "outside_limits": [], "documented": {}, "failure": None}
    red = plain | {"verdict": "failed", "failure": failure}
    runs = {
        "Port": {"checks": [plain], "limits": {"rope_types": ["default"]}},
        "Scaled": {"checks": [red], "limits": {"rope_types": ["llama3"]}},
    }
    states = {one.title: cell({"name": "toy", "runs": runs}, one, [CAUSE]).state for one in COLUMNS}
    assert states["logits"] is State.PASSED
    assert states["llama3"] is State.FAILED
    assert states["linear"] is State.NOT_COVERED
    runs["Scaled"] |= {"checks": [], "error": "ended by SIGSEGV"}
    assert cell({"name": "toy", "runs": runs}, COLUMNS[0], []).state is State.NOT_RUN


def test_a_cell_leads_to_the_cause_of_its_state_alone() -> None:
    """Not to that of another check of it which is hidden, or less bad."""
    right = "rms_norm_eps 1e-06"
    checks = [
        (
            "test_key_of_config_json[rope_theta (transformers 4)]",
            f"rope_theta: is right; the logits are those with {right}",
            0.0,
        ),
        (KEY, RAISED, 0.0),
        ("test_key_of_config_json[rope_theta an integer]", "is not read", 9.0),
    ]
    causes = [replace(CAUSE, seen=seen, title=seen) for seen in (right, "KeyError", "is not read")]
    found = {"not_covered": {}, "outside_limits": [], "documented": {}, "compared": 1}
    column = next(one for one in COLUMNS if one.title == "base")
    for n, title in ((1, None), (2, "KeyError"), (3, "is not read")):
        reds = [
            found
            | {"id": name, "verdict": "failed", "worst_share": share}
            | {"failure": {"message": message}}
            for name, message, share in checks[:n]
        ]
        one = cell({"name": "toy", "runs": {"Port": {"checks": reds}}}, column, causes)
        assert (one.cause.title if one.cause else None) == title
