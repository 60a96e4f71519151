"""The golden vectors are what their generator writes, tell every known bug, and excuse no port."""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from llama_parity.comparison.trace_file import TraceFile
from llama_parity.conversion.gguf_checkpoint import GgufCheckpoint
from reference_np.checkpoint import Checkpoint
from reference_np.config import LlamaConfig
from reference_np.mutants import FORWARD
from reference_np.training_mutants import TRAINING

from ..vectors import generate, page
from ..vectors.cases import all_cases
from ..vectors.folder import INDEX, VECTORS, load_index
from ..vectors.models import all_models
from ..vectors.reading import relative_error
from ..vectors.results import PRECISIONS
from ..vectors.schema import violations

SCHEMA = json.loads((VECTORS / "vectors.schema.json").read_text(encoding="utf-8"))
INDEXED = load_index()
WRITTEN = ("index.json", "index.txt", "models/*", "traces/*")
MOST_BYTES = 5_000_000


def written(folder: Path) -> dict[str, bytes]:
    """Return the contents of every file that the generator writes, by its place."""
    paths = [path for pattern in WRITTEN for path in folder.glob(pattern)]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


@pytest.mark.numeric
def test_the_files_are_what_the_generator_writes_byte_for_byte(tmp_path: Path) -> None:
    index = generate.generate(tmp_path)
    anew, stored = written(tmp_path), written(VECTORS)
    assert anew.keys() == stored.keys()
    assert [name for name in anew if anew[name] != stored[name]] == []
    assert generate.PAGE.read_text(encoding="utf-8") == page.text(index)


def test_the_files_are_small() -> None:
    assert sum(map(len, written(VECTORS).values())) < MOST_BYTES


def test_every_known_bug_fails_a_case_in_float32() -> None:
    told = {flag for case in INDEXED["cases"] for flag in case["flags"]}
    assert told == {mutant.name for mutant in (*FORWARD, *TRAINING)} == set(INDEXED["flags"])


def test_the_basic_cases_tell_bugs_of_the_harness_from_causal_calls_of_three_tokens() -> None:
    basic = [case for case in INDEXED["cases"] if case["basic"]]
    assert len(basic) >= 8
    assert INDEXED["cases"][: len(basic)] == basic
    for case in basic:
        assert case["needs"] in ([], ["batch"])
        trace = TraceFile(VECTORS / case["trace"])
        assert (trace.config.n_layers, len(trace.calls)) == (1, 1)
        assert trace.calls[0].tokens.size <= 4


def test_positions_are_below_the_context_of_their_model() -> None:
    for case in all_cases():
        context = all_models()[case.model].config.max_seq_len
        for call in case.calls:
            assert call.positions is None or call.positions.max() < context


def test_the_index_keeps_its_schema() -> None:
    assert violations(INDEXED, SCHEMA) == []


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"schema_version": 2}, ["index.schema_version: 2 is none of [1]"]),
        ({"cases": {}}, ["index.cases: {} is no array"]),
        ({"flags": {"x": {"effect": 3}}}, ["lacks bug_class", "lacks reports", "3 is no string"]),
        ({"more": 1}, ["index: has more"]),
        ({"precisions": ["float64"] * 5}, ["index.precisions: has 5 items, not 4 at most"]),
        ({"cases": []}, ["index.cases: has 0 items, not 1 or more"]),
    ],
)
def test_an_index_that_breaks_the_schema_would_be_seen(change: Any, found: list[str]) -> None:
    wrong = violations(INDEXED | change, SCHEMA)
    assert len(wrong) == len(found)
    assert all(part in line for part, line in zip(found, wrong, strict=True))


def test_the_index_names_every_file_and_model_once() -> None:
    models, cases = INDEXED["models"], INDEXED["cases"]
    named = [model["weights"] for model in models.values()]
    named += [model["gguf"]["file"] for model in models.values()]
    named += [case["trace"] for case in cases]
    assert sorted([*named, INDEX, "index.txt"]) == sorted(written(VECTORS))
    assert {case["model"] for case in cases} == set(models)
    assert len({case["id"] for case in cases}) == len(cases) == len(all_cases())


def test_a_trace_holds_just_what_the_index_bounds() -> None:
    for case in INDEXED["cases"]:
        trace = TraceFile(VECTORS / case["trace"])
        assert not trace.unknown
        assert trace.config.to_hf() == INDEXED["models"][case["model"]]["config"]
        for name, bounds in case["bounds"].items():
            kind, at, rest = name.split(".", 2)
            read = trace.read if kind == "call" else trace.read_step
            value = read(int(at), rest)
            assert value is not None
            assert np.isfinite(value).all()
            assert len(bounds) == len(PRECISIONS) + 1
            assert all(bound is None or 0 < bound < 1 for bound in bounds[:-1])


def test_weights_are_those_of_the_models_and_exact_in_sixteen_bits() -> None:
    for name, model in all_models().items():
        entry = INDEXED["models"][name]
        stored = Checkpoint(VECTORS / entry["weights"], np.float32)
        assert LlamaConfig.from_hf(entry["config"]) == model.config == stored.config
        for key, value in model.params.items():
            assert np.array_equal(stored[key], value)
            short = [value.astype(kind).astype("f4") for kind in (ml_dtypes.bfloat16, np.float16)]
            exact = all(np.array_equal(one, value) for one in short)
            assert exact or name == "float32-weights"


def test_gguf_files_hold_the_same_models() -> None:
    for name, model in all_models().items():
        entry = INDEXED["models"][name]["gguf"]
        stored = GgufCheckpoint(VECTORS / entry["file"], np.float32)
        assert LlamaConfig.from_hf(stored.hf) == model.config
        assert set(stored) == set(model.params)
        assert all(np.array_equal(stored[key], value) for key, value in model.params.items())
        assert entry["exact"] == (entry["note"] is None)


def test_gguf_files_are_read_by_their_makers_package() -> None:
    gguf = pytest.importorskip("gguf")
    for name in ("gqa", "llama3", "linear"):
        reader = gguf.GGUFReader(VECTORS / INDEXED["models"][name]["gguf"]["file"])
        names = {tensor.name for tensor in reader.tensors}
        assert {"token_embd.weight", "blk.0.attn_q.weight", "output.weight"} <= names
        assert ("rope_freqs.weight" in names) == (name == "llama3")


def test_llama_cpp_computes_the_logits_from_the_gguf_files() -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    cases = [case for case in INDEXED["cases"] if case["kind"] == "forward" and not case["needs"]]
    for case in cases:
        trace = TraceFile(VECTORS / case["trace"])
        tokens, exact = trace.calls[0].tokens[0].tolist(), trace.read(0, "logits")
        assert exact is not None
        settings = {"n_ctx": 64, "n_threads": 1, "logits_all": True, "verbose": False}
        path = VECTORS / INDEXED["models"][case["model"]]["gguf"]["file"]
        # A cache of float32: its default is float16.
        llama = llama_cpp.Llama(str(path), type_k=0, type_v=0, flash_attn=False, **settings)
        llama.eval(tokens)
        error = relative_error(llama.scores[: len(tokens)], exact[0])
        llama.close()
        assert error <= case["bounds"]["call.0.logits"][1], case["id"]
