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
    """Return all results of a folder by name; InputError for a file of another schema."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; python -m parity_tests.grid run makes it")
    results = [read_json(file) for file in sorted(folder.glob("*.json"))]
    for result in results:
        if result.get("schema") != SCHEMA:
            raise InputError(f"{folder}: a result of schema {result.get('schema')}, not {SCHEMA}")
    return results


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
