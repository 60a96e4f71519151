"""What a run of PPO is given and cannot use: told in one line before it makes its directory."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llama_common.memory import gib
from llama_torch import ppo
from llama_torch.model.config import ModelConfig
from llama_torch.model.llama import Llama
from llama_torch.ppo_config import PpoConfig, PpoOptimConfig
from llama_torch.rlhf.ppo_source import _load
from llama_torch.rlhf.ppo_task import describe_memory
from llama_torch.tokenizer.chat_template import load_jinja
from llama_torch.tokenizer.loading import load_tokenizer

from ..support.ppo_runs import MODEL, REWARD, RUN, Models, parsed, write_models
from ..support.reward_models import write_reward_model


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return write_models(tmp_path_factory.mktemp("models"))


def copied(source: Path, folder: Path) -> Path:
    shutil.copytree(source, folder)
    return folder


def not_finite(source: Path, folder: Path) -> Path:
    path = copied(source, folder) / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = math.nan
    save_file(tensors, path)
    return folder


def of_other_tokens(source: Path, folder: Path) -> Path:
    """Copy a model, and let two tokens of its tokenizer change their places."""
    path = copied(source, folder) / "tokenizer.json"
    content = json.loads(path.read_text())
    ids = content["model"]["vocab"]
    one, other = sorted(ids, key=ids.__getitem__)[40:42]
    ids[one], ids[other] = ids[other], ids[one]
    path.write_text(json.dumps(content))
    return folder


def of_short_context(source: Path, folder: Path) -> Path:
    path = copied(source, folder) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"max_position_embeddings": 16}))
    return folder


CHANGED = {
    "--reference a NaN": (not_finite, "up_proj.weight is not finite in torch.float32; give an"),
    "--reward a NaN": (not_finite, "up_proj.weight is not finite in torch.float32; give an"),
    "--safety-reward a NaN": (not_finite, "up_proj.weight is not finite in torch.float32; give"),
    "--reference tokens": (of_other_tokens, "its tokenizer has other tokens than that of --init-"),
    "--reference context": (of_short_context, "tokens and its context holds 16; ask for fewer"),
}


@pytest.mark.parametrize("name", CHANGED)
def test_a_frozen_model_that_would_mislead_is_refused(
    name: str, models: Models, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They were run with, or told after the run directory was made, as if --lr were at fault."""
    flag, (change, message) = name.split()[0], CHANGED[name]
    sources = {"--reference": models.policy, "--reward": models.reward}
    made = change(sources.get(flag, models.safety), tmp_path / "made")
    refuse([flag, str(made)], f"error: {flag} {made}: ", message, models, tmp_path, capsys)


def refuse(
    more: list[str],
    begin: str,
    message: str,
    models: Models,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Require that a run with flags is refused in one line, and leaves no directory."""
    assert ppo.main([*RUN, *models.flags, *more, "--out", str(folder / "run")]) == 2
    said = capsys.readouterr().err.splitlines()
    [error] = [line for line in said if not line.startswith("note: ")]
    assert error.startswith(begin)
    assert message in error
    assert not (folder / "run").exists()


def test_a_reward_model_that_reads_text_has_room_for_the_longest_prompt(
    models: Models, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = write_reward_model(tmp_path / "small", "pieces", replace(REWARD, max_seq_len=20), 1)
    said = f"error: --reward {small}: --data {models.prompts}: line "
    refuse(["--reward", str(small)], said, "its context holds 20", models, tmp_path, capsys)


def test_held_out_prompts_are_of_those_that_fit(
    models: Models, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of two prompts the first would be held out, and a long one ended the run."""
    path, long = tmp_path / "prompts.jsonl", {"prompt": "Count " * 90}
    config = replace(parsed((*RUN, *models.flags)), out=str(tmp_path / "run"))
    config = replace(config, data=replace(config.data, data=(str(path),)))
    template = load_jinja(models.policy, load_tokenizer(models.policy, MODEL.vocab_size))
    short = [{"prompt": text} for text in "ab"]
    for at in range(3):
        lines = [*short[:at], long, *short[at:]]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        train, val, n_long = _load(config, template)
        assert [len(train), len(val), n_long] == [1, 1, 1]
    path.write_text(json.dumps(long) + "\n")
    flags = ["--val-data", str(path)]
    said = "error: --max-new-tokens 5: the context of 96 tokens holds no prompt of --val-data "
    refuse(flags, said, "ask for fewer", models, tmp_path, capsys)


def test_the_memory_told_is_a_processs_with_its_moments() -> None:
    """GiB of gradients and moments, and of what is learnt: a share of 512 answers."""
    with torch.device("meta"):
        model = Llama(ModelConfig(1024, 8, 8, 8, 128, 4096, 4096, 2**21))
    n = sum(parameter.numel() for parameter in model.parameters())
    bare = PpoConfig(model=model.config, dtype="float32")
    in_bfloat16 = replace(bare, dtype="bfloat16", optim=PpoOptimConfig(moments="bfloat16"))
    tokens = 2**20 + bare.max_new_tokens
    for config, n_bytes, processes in ((bare, 12, 1), (bare, 12, 2), (in_bfloat16, 8, 1)):
        said = describe_memory(config, model, model, [], 2**20, processes)
        assert f"gradients and moments {gib(n_bytes * n, 2)}, " in said
        assert f"learnt {gib(80 * 512 // processes * tokens, 2)}; activations" in said
