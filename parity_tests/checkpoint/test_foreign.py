"""What stands in place of a model is answered by both readers in one line, with the remedy."""

import os
import shlex
from pathlib import Path
from types import ModuleType

import pytest

from llama_parity import compare, convert
from llama_torch import chat, evaluate, generate
from llama_torch.checkpoint.hf import load_model
from reference_np.checkpoint import Checkpoint
from reference_np.config import LlamaConfig

from ..support.meta_checkpoints import DTYPES, Cut, meta_params, meta_tensors, write_meta

GGUF = "is a GGUF file; convert it, python tools/convert.py FILE DIR, and give DIR"
ONNX = "is an ONNX file; give the Hugging Face directory that it was exported from"
PICKLE = "a pickle may run code, so read it with torch.load(..., weights_only=True)"

MODEL, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD = "model-00001-of-00002.safetensors"

# The files that are there, the path that is given, and what is said of it.
CASES = [
    (["m/params.json", "m/consolidated.00.pth"], "m", "m: is in Meta's form; convert it, python "),
    (["m/consolidated.00.pth"], "m/consolidated.00.pth", ".pth: is in Meta's form; convert it, "),
    (["m/pytorch_model.bin"], "m", f"m: holds pytorch_model.bin and no {MODEL}; {PICKLE}"),
    (["m/pytorch_model.bin"], "m/pytorch_model.bin", f"is no .safetensors file; {PICKLE}"),
    (["m/model.pt"], "m/model.pt", f"is no .safetensors file; {PICKLE}"),
    (["m/model.Q4.gguf"], "m/model.Q4.gguf", GGUF),
    (["m/model.Q4.gguf"], "m", "m: holds model.Q4.gguf, a GGUF file; convert it, python"),
    (["m/GGUF.weights"], "m/GGUF.weights", GGUF),
    (["m/model.onnx"], "m/model.onnx", ONNX),
    (["m/model.onnx", "m/config.json"], "m", "m: holds model.onnx, an ONNX file; give the"),
    (["m/adapter_config.json", "m/a.safetensors"], "m", "without its base model; merge it into"),
    (["m/snapshots/abc/model.safetensors"], "m", "m: holds no model itself; give m/snapshots/abc"),
    ([f"m/a/{MODEL}", f"m/b/{INDEX}"], "m", "m: holds no model itself; give m/a or m/b"),
    ([f"m/{i}/{MODEL}" for i in range(5)], "m", "give m/0 or m/1 or m/2 or 2 more"),
    (["m/training_state.safetensors"], "m", "m: holds what a training run continues from; give"),
    (["m/run.json", "m/config.json"], "m", "m: is a run that has saved no model yet; continue it"),
    (["m/config.json", "m/w.safetensors"], "m", "give the file itself, m/w.safetensors"),
    ([f"m/{SHARD}"], "m", f"m: holds {SHARD} and no {INDEX} that names all parts; copy that too"),
    ([f"m/{SHARD}", f"m/{INDEX}"], f"m/{SHARD}", "one part of the weights; give its directory, m"),
    (["m/config.json"], "m/config.json", "m/config.json: holds no weights; give its directory, m"),
    (["m/tokenizer.model"], "m/tokenizer.model", "holds no weights; give its directory, m"),
    (["m/config.json"], "m", "m/model.safetensors: no such file; give a model directory"),
    ([], "none", "none: no such file; give a model directory or a .safetensors file"),
    (
        [],
        "o/Llama-2-7b",
        "by hf download o/Llama-2-7b --local-dir Llama-2-7b, then give Llama-2-7b",
    ),
]


def make(names: list[str]) -> None:
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(b"GGUF" if "GGUF" in name else b"PK\x03\x04")


@pytest.mark.parametrize(("files", "given", "said"), CASES)
def test_both_readers_name_it_with_the_remedy(
    files: list[str], given: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make(files)
    messages = []
    for read in (load_model, Checkpoint):
        with pytest.raises(ValueError, match=r"\A[^\n]*\Z") as caught:
            read(given)
        messages.append(str(caught.value))
    assert said in messages[0]
    assert messages[0] == messages[1]


@pytest.mark.parametrize("given", ["runs/1", "./o/Llama", "a/b/c", "here/none", "x/m.safetensors"])
def test_a_path_is_no_name_on_the_hub(
    given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("here").mkdir()
    for read in (load_model, Checkpoint):
        with pytest.raises(ValueError, match="no such file; give a[^;]*$"):
            read(given)


def refused(command: ModuleType, ckpt: str, capsys: pytest.CaptureFixture[str]) -> str:
    """Return the one line with which a command answers ``ckpt``."""
    flags = {
        generate: ["--ckpt", ckpt, "--prompt", "a"],
        chat: ["--ckpt", ckpt],
        evaluate: ["--ckpt", ckpt],
        compare: [ckpt],
    }
    capsys.readouterr()
    assert command.main(flags[command]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err


@pytest.mark.parametrize("command", [generate, chat, evaluate, compare])
def test_the_command_that_is_printed_converts_metas_form(
    command: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    cut = Cut(LlamaConfig(16, 1, 2, 1, 8, 24, 32), DTYPES["float32"], 1, 0)
    folder = tmp_path / "llama 2" / "7b"
    folder.parent.mkdir()
    write_meta(folder, meta_params(cut.config), meta_tensors(cut), 1)
    monkeypatch.chdir(folder.parent)
    for given, target in (("7b", "7b-hf"), ("7b/", "7b-hf"), (str(folder), f"{folder}-hf")):
        line = refused(command, given, capsys)
        words = shlex.split(line.partition("convert it, ")[2].partition(", and give")[0])
        assert words == ["python", "tools/convert.py", given.rstrip("/"), target]
    os.chdir(folder)
    line = refused(command, ".", capsys)
    words = shlex.split(line.partition("convert it, ")[2].partition(", and give")[0])
    assert convert.main(words[2:]) == 0
    assert len(Checkpoint(f"{folder}-hf")) == len(load_model(f"{folder}-hf").state_dict())
