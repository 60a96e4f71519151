"""docs/conformance.md lists the checks that there are, and the version to pin."""

import re
import tomllib

import pytest

from ..support.documents import ROOT

PAGE = (ROOT / "docs" / "conformance.md").read_text(encoding="utf-8")
WORKFLOW = PAGE.partition("```yaml\n")[2].partition("```")[0]


def test_every_check_is_in_the_table() -> None:
    table = PAGE[PAGE.index("### What each check means") :]
    listed = set(re.findall(r"^\| `(test_\w+)", table[: table.index("###", 3)], re.MULTILINE))
    sources = (path.read_text() for path in (ROOT / "parity_tests/conformance").glob("test_*.py"))
    defined = {
        name for text in sources for name in re.findall(r"^def (test_\w+)", text, re.MULTILINE)
    }
    assert listed == defined


def test_the_pinned_version_is_a_date_and_this_one() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert re.fullmatch(r"20\d\d\.(1[0-2]|[1-9])\.\d+", version)
    assert f"llama-parity=={version}" in PAGE
    assert f"`{version}` is" in PAGE


def test_the_workflow_has_about_thirty_lines() -> None:
    assert WORKFLOW.count("\n") <= 34


def test_the_workflow_is_yaml_of_steps() -> None:
    yaml = pytest.importorskip("yaml")
    workflow = yaml.load(WORKFLOW, yaml.BaseLoader)  # the base loader does not take "on" for true
    assert set(workflow) == {"name", "on", "jobs"}
    [job] = workflow["jobs"].values()
    assert [step.get("uses") or step["run"].split()[:2] for step in job["steps"]] == [
        *("actions/checkout@v4", "actions/setup-python@v5"),
        *(["pip", "install"], ["llama-parity", "test"], ["llama-parity", "test"]),
        "actions/upload-artifact@v4",
    ]
