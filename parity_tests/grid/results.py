"""The results of the grid: a JSON file for each package in results/."""

import json
import tomllib
from pathlib import Path
from typing import Any

from llama_common.errors import InputError
from llama_common.files import read_json, write_text

RESULTS = Path(__file__).parent / "results"
NOT_RUN = Path(__file__).with_name("not_run.toml")
SCHEMA = 1

# What the pages read of a result, of the run of a backend, and of a check.
RESULT = {"name": str, "title": str, "requires": list, "versions": dict, "runs": dict}
RUN = {"compared": int, "dtypes": list, "limits": dict, "processor": list}
CHECK = {
    **{"id": str, "verdict": str, "compared": int, "worst_share": float | int | None},
    **{"not_covered": dict, "outside_limits": list, "documented": dict, "failure": dict | None},
}


def write_result(result: dict[str, Any], folder: Path) -> Path:
    """Write a package's result atomically; return its file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{result['name']}.json"
    write_text(path, json.dumps(result, indent=1, allow_nan=False) + "\n")
    return path


def kept_date(name: str, folder: Path) -> str | None:
    """Return the date of a package's result that has runs; None where there is no such result."""
    try:
        result = read_json(folder / f"{name}.json")
    except InputError:
        return None
    return str(result.get("date")) if result.get("runs") else None


def read_results(folder: Path) -> list[dict[str, Any]]:
    """Return all results of a folder by name; InputError for one that is not as a run writes it."""
    files = sorted(folder.glob("*.json"))
    if not files:
        what = "no result in it" if folder.is_dir() else "no such folder"
        raise InputError(f"{folder}: {what}; python -m parity_tests.grid run makes it")
    results = []
    for file in files:
        result = read_json(file)
        if result.get("schema") != SCHEMA:
            why = f"a result of schema {result.get('schema')}, not {SCHEMA}"
            raise InputError(f"{file}: {why}; {_again(file)}")
        _require_result(result, file)
        results.append(result)
    return results


def _require_result(result: dict[str, Any], file: Path) -> None:
    _require(result, RESULT, file)
    if result["name"] != file.stem:
        raise InputError(f"{file}: is the result of {result['name']}; name it so, or remove it")
    _require(result, {"date": str} if result["runs"] else {"not_run": str}, file)
    for run in result["runs"].values():
        _require(run, {"checks": list}, file)
        _require(run, {"error": str} if "error" in run else RUN, file)
        for check in run["checks"]:
            _require(check, CHECK, file)


def _require(found: Any, kinds: dict[str, Any], file: Path) -> None:
    """Raise InputError for what is no object, or has a key that is missing or of another type."""
    for key, kind in kinds.items():
        if not isinstance(found, dict) or not isinstance(found.get(key, _require), kind):
            raise InputError(f"{file}: {key}: missing, or of another type; {_again(file)}")


def _again(file: Path) -> str:
    return f"write it again: python -m parity_tests.grid run {file.stem}"


def tried_without_port(file: Path = NOT_RUN) -> list[dict[str, Any]]:
    """Return the packages that have no port, each as a result without runs."""
    listed = tomllib.loads(file.read_text(encoding="utf-8"))
    return [failed_result(name, name, [], why) for name, why in sorted(listed.items())]


def failed_result(name: str, title: str, requires: list[str], why: str) -> dict[str, Any]:
    """Return the result of a package that could not be installed."""
    return {
        "schema": SCHEMA,
        "name": name,
        "title": title,
        "requires": requires,
        "not_run": why,
        "versions": {},
        "runs": {},
    }
