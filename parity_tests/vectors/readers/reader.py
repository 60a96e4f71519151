"""Run a Llama on every golden vector that has calls, and hold its logits to their bounds.

    python reader.py FOLDER

NumPy alone. Your port takes the place of llama.py.
"""

import json
import sys
from pathlib import Path

import numpy as np
from llama import forward

PRECISION = "float64"  # whose bounds: float64, float32, bfloat16 or float16
DTYPES = {"F32": "<f4", "F64": "<f8", "I64": "<i8", "BOOL": "?"}


def load(path):
    """Return the tensors and the metadata of a safetensors file."""
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header, tensors = json.loads(content[8:start]), {}
    metadata = header.pop("__metadata__")
    for name, entry in header.items():
        first, end = (start + at for at in entry["data_offsets"])
        tensors[name] = np.frombuffer(content[first:end], DTYPES[entry["dtype"]])
        tensors[name] = tensors[name].reshape(entry["shape"])
    return tensors, metadata


def errors(folder, index, case):
    """Yield the error of each call's logits, and its bound."""
    model, caches, ends = index["models"][case["model"]], [], []
    w, (given, metadata) = load(folder / model["weights"])[0], load(folder / case["trace"])
    for n, call in enumerate(json.loads(metadata["calls"])):
        tokens, after = given[f"call.{n}.tokens"], call["after"]
        (rows, length), cached = tokens.shape, 0 if after is None else ends[after]
        following = np.tile(np.arange(cached, cached + length), (rows, 1))
        positions = given.get(f"call.{n}.positions", following)
        causal = np.tri(length, cached + length, cached, bool)[None]
        mask = given.get(f"call.{n}.mask", causal)
        cache = None if after is None else caches[after]
        logits, present = forward(w, model["config"], tokens, positions, mask, cache)
        caches.append(present)
        ends.append(cached + length)
        real = case["real"][n] or [[0, length]] * rows  # padding is not judged
        pair = logits, given[f"call.{n}.logits"]
        a, e = (np.concatenate([x[b, i:j] for b, (i, j) in enumerate(real)]) for x in pair)
        bound = case["bounds"][f"call.{n}.logits"][index["precisions"].index(PRECISION)]
        yield np.abs(a - e).max() / np.abs(e).max(), bound


def main(folder):
    """Print what fails; return the exit code."""
    index = json.loads((folder / "index.json").read_text())
    if index["schema_version"] != 1:
        sys.exit(f"schema version {index['schema_version']}, not 1")
    cases = [case for case in index["cases"] if case["kind"] != "training"]
    found = [(case["id"], *pair) for case in cases for pair in errors(folder, index, case)]
    failed = [one for one in found if not one[1] <= one[2]]  # a NaN fails
    for name, error, bound in failed:
        print(f"FAILED {name}: error {error}, {error / bound} of its bound")
    worst = max((error / bound for _, error, bound in found), default=0.0)
    print(f"{len(cases)} cases, {len(failed)} calls failed, largest error {worst} of its bound")
    return int(bool(failed) or not cases)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else ".")))
