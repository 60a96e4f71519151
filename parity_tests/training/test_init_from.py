"""Runs that begin from the weights of a model directory, of any tokenizer, dtype and sharding."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llama_torch import evaluate, export, prepare, train
from llama_torch.checkpoint.hf import load_model
from llama_torch.inference.perplexity import evaluate as measure
from llama_torch.inference.text_model import load

from ..support.model_directories import CONFIGS, GENERATION, KINDS, RUN, WINDOW, flags_of
from ..support.trainer_runs import TEXT, refused, scalars, state_file, stop_after

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_begins_with_the_loss_that_evaluate_measures(
    kind: str, models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out, config = models[kind], tmp_path / "run", CONFIGS[kind]
    flags, document = flags_of(model, kind, tmp_path)
    assert train.main([*flags, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert f"begun from {model}" in printed
    assert "sample: 'The" in printed
    loaded = load(model, device="cpu", dtype="float32")
    expected = measure(loaded.model, loaded.tokenizer, [document], WINDOW, WINDOW)
    first = dict(scalars(out)["val/loss"])[0]
    assert first == pytest.approx(expected.nats / expected.tokens, rel=1e-6)
    assert abs(first - math.log(config.vocab_size)) > 1e-3  # not what random weights have
    require_model_directory(out, model, kind)
    require_model_directory(out / "best", model, kind)
    ours = load_file(out / "model.safetensors")
    for name, weight in load_model(model).named_parameters():
        assert 0 < (ours[name] - weight).abs().max() < 0.02, name  # a few steps away
    text = tmp_path / "document.txt"
    text.write_text(document)
    found = ["--ckpt", str(out), "--device", "cpu", "--json"]
    assert evaluate.main([*found, "--data", str(text)]) == 0
    assert evaluate.main(found) == 0  # what the run held out
    given, held_out = map(json.loads, capsys.readouterr().out.splitlines())
    assert (held_out["documents"], held_out["tokens"]) == (1, given["tokens"])
    assert held_out["perplexity"] == given["perplexity"]


def require_model_directory(folder: Path, model: Path, kind: str) -> None:
    """Assert that a folder is one of the same model with other weights."""
    for name in (*TOKENIZER_FILES, "generation_config.json"):
        assert (folder / name).is_file() == (model / name).is_file()
        if (model / name).is_file():
            assert (folder / name).read_bytes() == (model / name).read_bytes()
    assert json.loads((folder / "generation_config.json").read_text()) == GENERATION
    mine, theirs = (json.loads((f / "config.json").read_text()) for f in (folder, model))
    assert mine == theirs
    found = load(folder)
    assert found.model.config == CONFIGS[kind]
    assert found.generate("The llama", max_new_tokens=4, temperature=0).tokens


@pytest.mark.parametrize("kind", ["bytes", "spaced"])
def test_transformers_loads_what_was_trained(
    kind: str, models: dict[str, Path], tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    out = tmp_path / "run"
    assert train.main([*flags_of(models[kind], kind, tmp_path)[0], "--out", str(out)]) == 0
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    ids = transformers.AutoTokenizer.from_pretrained(out)("A llama walks")["input_ids"]
    ours = load(out, device="cpu", dtype="float32")
    assert ids == ours.encode("A llama walks")
    with torch.no_grad():
        logits = theirs(torch.tensor([ids])).logits
        torch.testing.assert_close(ours.model(torch.tensor([ids]))[0], logits)


@pytest.mark.parametrize(("kind", "stop_at"), [("pieces", 0), ("bytes", 2), ("gpt2", 3)])
def test_a_resumed_run_needs_the_directory_until_its_first_checkpoint(
    kind: str,
    stop_at: int,
    models: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model, whole, parted = tmp_path / "model", tmp_path / "whole", tmp_path / "parted"
    shutil.copytree(models[kind], model)
    flags, _ = flags_of(model, kind, tmp_path)
    assert train.main([*flags, "--out", str(whole)]) == 0
    with monkeypatch.context() as patch:
        stop_after(stop_at, patch)
        assert train.main([*flags, "--out", str(parted)]) == 130
    assert state_file(parted).exists() == (stop_at >= 2)
    moved = model.rename(tmp_path / "moved")
    if stop_at < 2:
        said = refused(["--resume", "--out", str(parted)], capsys)
        assert f"{parted} has no checkpoint yet, and {model}, which it begins from" in said
        moved.rename(model)
    monkeypatch.chdir(tmp_path / "cache")
    assert train.main(["--resume", "--out", str(parted)]) == 0
    for name in (state_file(whole).relative_to(whole), "model.safetensors", "best/config.json"):
        one, other = whole / name, parted / name
        if one.suffix == ".json":
            assert one.read_bytes() == other.read_bytes()
            continue
        mine, theirs = load_file(one), load_file(other)
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    first, second = scalars(whole), scalars(parted)
    for tag in ("train/loss", "train/lr", "val/loss"):
        assert dict(first[tag]) == dict(second[tag])


def test_a_run_goes_on_from_the_directory_that_it_began_from(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags, _ = flags_of(models["pieces"], "pieces", tmp_path)
    out = tmp_path / "run"
    assert train.main([*flags, "--out", str(out)]) == 0
    record = json.loads((out / "run.json").read_text())
    assert record["settings"]["init_from"] == record["identity"]["init_from"]
    again = ["--resume", "--out", str(out), "--init-from"]
    assert train.main([*again, str(models["pieces"])]) == 0
    said = refused([*again, str(models["bytes"])], capsys)
    assert f"--init-from is {models['pieces']} there and {models['bytes']} here" in said
    hf = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(hf | {"rms_norm_eps": 0.5}))
    said = refused(["--resume", "--out", str(out)], capsys)
    assert f"--norm-eps 1e-05 contradicts {out}/config.json (rms_norm_eps=0.5); put" in said


def test_a_run_of_ones_own_is_a_beginning(
    tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """With its tokenizer and validation loss, longer than it was."""
    shape = ["--dim", "8", "--n-layers", "1", "--n-heads", "2", "--n-kv-heads", "1"]
    first, second = tmp_path / "first", tmp_path / "second"
    common = [*RUN, "--data", text, "--cache-dir", str(tmp_path)]
    assert train.main([*common, *shape, "--max-seq-len", "32", "--out", str(first)]) == 0
    assert train.main([*common, "--max-seq-len", "32", "--init-from", str(first),
                       "--out", str(second)]) == 0  # fmt: skip
    one, other = scalars(first)["val/loss"], scalars(second)["val/loss"]
    assert other[0][1] == pytest.approx(one[-1][1], rel=1e-6)
    assert other[-1][1] < other[0][1]
    names = {path.name for path in second.iterdir()}
    assert names == {path.name for path in first.iterdir()}


def test_the_window_is_the_models_context_unless_chosen(
    models: dict[str, Path], tmp_path: Path
) -> None:
    """A flag that says what the directory says is no contradiction."""
    flags, _ = flags_of(models["spaced"], "spaced", tmp_path)
    index = flags.index("--max-seq-len")
    rest = [*flags[:index], *flags[index + 2 :], "--dim", "12", "--steps", "1"]
    toml = tmp_path / "run.toml"
    at = rest.index("--init-from")
    toml.write_text(f"n_layers = 2\ninit_from = {json.dumps(rest[at + 1])}\n")
    rest = [*rest[:at], *rest[at + 2 :], "--config", str(toml)]
    assert train.main([*rest, "--out", str(tmp_path / "run")]) == 0
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["settings"]["model"]["max_seq_len"] == 40


def test_shards_are_prepared_with_the_models_tokenizer(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    data, model = ["--data", str(tmp_path / "a.txt"), "--workers", "1"], models["pieces"]
    theirs, own = tmp_path / "gpt2", tmp_path / "pieces"
    assert prepare.main([*data, "--out", str(theirs)]) == 0
    assert prepare.main([*data, "--out", str(own), "--tokenizer", str(model)]) == 0
    flags = [*RUN, "--init-from", str(model), "--pack-documents", "--out", str(tmp_path / "run")]
    said = refused([*flags, "--data", str(theirs)], capsys)
    assert f"holds ids of another tokenizer than {model}'s" in said
    assert "--init-from" in refused([*RUN, "--data", str(own)], capsys)
    assert train.main([*flags, "--data", str(own)]) == 0


def test_it_is_verified_measured_and_exported(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags, _ = flags_of(models["bytes"], "bytes", tmp_path)
    out = tmp_path / "run"
    assert train.main([*flags, "--dry-run", "--out", str(out)]) == 0
    assert not out.exists()
    assert "tokens/s" in capsys.readouterr().out
    assert train.main([*flags, "--verify-every", "1", "--out", str(out)]) == 0
    assert capsys.readouterr().out.count("verified: of the bounds of their errors") == 4
    target = tmp_path / "exported"
    assert export.main([str(out), "--to", str(target)]) == 0
    require_model_directory(target, models["bytes"], "bytes")
