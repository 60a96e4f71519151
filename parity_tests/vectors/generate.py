"""Write the golden vectors, their index and their page: python -m parity_tests.vectors.generate.

The bytes are the same on every processor: expected values are computed in decimals of 40 digits
and rounded once, bounds with sums in a fixed order (arithmetic.py).
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama_parity.comparison.trace_file import TraceWriter, write_trace
from reference_np.ops import Array

from . import flags, page
from .case_parts import Case
from .cases import all_cases
from .files import gguf_note, write_gguf, write_safetensors
from .folder import FORMAT, INDEX, SCHEMA_VERSION
from .models import Model, all_models
from .results import PRECISIONS, bounds, expected, told_apart
from .text_index import text_index

FOLDER = Path(__file__).parent
PAGE = FOLDER.parents[1] / "docs" / "vectors.md"
MEASURE = "max |actual - expected| / max |expected| over the real tokens of one tensor, in float64"


def write_model(folder: Path, model: Model) -> dict[str, Any]:
    """Write a model's weights; return its entry of the index."""
    weights, gguf = f"models/{model.name}.safetensors", f"models/{model.name}.gguf"
    write_safetensors(folder / weights, model.params, {"config": model.config.to_json()})
    write_gguf(folder / gguf, model.config, model.params)
    note = gguf_note(model.config)
    return {
        "about": model.about,
        "config": model.config.to_hf(),
        "weights": weights,
        "gguf": {"file": gguf, "exact": note is None, "note": note},
    }


def write_case(folder: Path, case: Case, model: Model) -> dict[str, Any]:
    """Write a case's trace; return its entry of the index."""
    exact = expected(case, model)
    limits = bounds(case, model, exact)
    shown, in_float64 = told_apart(case, model, exact, limits)
    path = f"traces/{case.name}.safetensors"
    hyper = case.hyperparameters
    write_trace(
        folder / path,
        model.config,
        case.calls,
        "float64",
        lambda writer: _add(writer, exact),
        steps=case.steps,
        hyperparameters=hyper,
    )
    return {
        "id": case.name,
        "about": case.about,
        "kind": case.kind,
        "basic": case.basic,
        "model": case.model,
        "trace": path,
        "needs": needs(case),
        "real": list(case.real),
        "flags": shown,
        "flags_float64_only": in_float64,
        "bounds": limits,
    }


def _add(writer: TraceWriter, exact: Mapping[str, Array]) -> None:
    for name, value in exact.items():
        kind, index, rest = name.split(".", 2)
        (writer.add if kind == "call" else writer.add_step)(int(index), rest, value)


def needs(case: Case) -> list[str]:
    """Return what a port needs besides causal calls from position 0."""
    batches = [batch for step in case.steps for batch in step.batches]
    given = {
        "batch": any(len(call.tokens) > 1 for call in case.calls),
        "positions": any(one.positions is not None for one in (*case.calls, *batches)),
        "mask": any(one.mask is not None for one in (*case.calls, *batches)),
        "cache": len(case.calls) > 1,
        "gradients": bool(case.steps),
        "optimizer": case.update,
    }
    return [name for name, needed in given.items() if needed]


def generate(folder: Path) -> dict[str, Any]:
    """Write every file of the vectors into a folder; return the index."""
    for part in ("models", "traces"):
        (folder / part).mkdir(parents=True, exist_ok=True)
        for old in (folder / part).iterdir():
            old.unlink()
    models, cases = all_models(), all_cases()
    index = {
        "format": FORMAT,
        "schema_version": SCHEMA_VERSION,
        "measure": MEASURE,
        "precisions": list(PRECISIONS),
        "models": {name: write_model(folder, model) for name, model in models.items()},
        "cases": [write_case(folder, case, models[case.model]) for case in cases],
        "flags": flags.notes(),
    }
    (folder / INDEX).write_text(json_text(index), encoding="utf-8")
    (folder / "index.txt").write_text(text_index(folder, index), encoding="utf-8")
    return index


def json_text(index: Mapping[str, Any]) -> str:
    """Return the index as JSON, a line for each model, case and flag."""
    parts = []
    for key, value in index.items():
        if key in ("models", "flags"):
            rows = [f"  {json.dumps(name)}: {json.dumps(one)}" for name, one in value.items()]
            parts.append(f"{json.dumps(key)}: {{\n" + ",\n".join(rows) + "\n}")
        elif key == "cases":
            rows = [f"  {json.dumps(one)}" for one in value]
            parts.append(f"{json.dumps(key)}: [\n" + ",\n".join(rows) + "\n]")
        else:
            parts.append(f"{json.dumps(key)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def main() -> None:
    """Write the vectors here, or into another folder; and in a clone their page."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, default=FOLDER)
    folder = parser.parse_args().folder
    index = generate(folder)
    if folder == FOLDER and PAGE.parent.is_dir():
        PAGE.write_text(page.text(index), encoding="utf-8")
    print(f"{len(index['cases'])} cases of {len(index['models'])} models in {folder}")


if __name__ == "__main__":
    main()
