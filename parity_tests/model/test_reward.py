"""The reward model's scores are transformers', and it is not taken for a language model."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llama_parity.conversion.hf_checkpoint import read_hf
from llama_torch import chat, evaluate, generate, train
from llama_torch.checkpoint.directory_files import write_directory_files
from llama_torch.checkpoint.hf import load_model, load_reward_model, save_model
from llama_torch.checkpoint.stored_weights import StoredWeights
from llama_torch.model.config import REWARD_KEYS, ModelConfig
from llama_torch.model.llama import Llama
from llama_torch.model.pair_loss import scores_at
from llama_torch.model.reward import RewardModel
from llama_torch.model.shapes import SCORE
from reference_np.checkpoint import Checkpoint

from ..support.checkpoints import ERRORS

PAD = 3
CONFIG = ModelConfig(16, 2, 4, 2, 4, 24, 40, 32, tie_embeddings=True)


def write_reward_model(folder: Path, config: ModelConfig = CONFIG) -> RewardModel:
    folder.mkdir(exist_ok=True)
    model = RewardModel(config)
    model.init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5)
    write_directory_files(folder, config)
    path = folder / "config.json"
    hf = json.loads(path.read_text()) | REWARD_KEYS | {"pad_token_id": PAD}
    path.write_text(json.dumps(hf))
    save_model(folder, config, model.state_dict())
    return model


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
def test_transformers_reads_the_same_scores(tmp_path: Path, is_tied: bool, side: str) -> None:
    transformers = pytest.importorskip("transformers")
    config = ModelConfig(16, 2, 4, 2, 4, 24, 40, 32, tie_embeddings=is_tied)
    write_reward_model(tmp_path, config)
    peer, loaded = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path, dtype="float32", output_loading_info=True
    )
    assert type(peer).__name__ == "LlamaForSequenceClassification"
    assert peer.num_labels == 1
    assert not any(loaded.values()), loaded
    rows = [[1, 5, 9, 12, 30], [7, PAD, 11], [2]]  # the padding's id may stand inside a row
    width = max(map(len, rows))
    ours = load_reward_model(tmp_path)
    scores = [
        scores_at(
            ours.model(torch.tensor([row]))[0], ours.head_weight, torch.tensor([len(row) - 1])
        )
        for row in rows
    ]
    padded = [
        [PAD] * (width - len(r)) + r if side == "left" else r + [PAD] * (width - len(r))
        for r in rows
    ]
    real = [[0] * (width - len(r)) + [1] * len(r) for r in rows]
    mask = torch.tensor(real if side == "left" else [r[::-1] for r in real])
    theirs = peer(input_ids=torch.tensor(padded), attention_mask=mask).logits[:, 0]
    torch.testing.assert_close(torch.cat(scores), theirs, rtol=1e-5, atol=1e-5)
    assert theirs.std() > 0.05  # scores that are all alike would agree too


def test_the_directory_comes_back_as_it_was(tmp_path: Path) -> None:
    made = write_reward_model(tmp_path)
    found = load_reward_model(tmp_path)
    assert found.config == CONFIG
    assert found.state_dict().keys() == made.state_dict().keys()
    for name, value in made.state_dict().items():
        assert torch.equal(found.state_dict()[name], value)


READERS: dict[str, Callable[[Path], Any]] = {
    "load_model": load_model,
    "the oracle": Checkpoint,
    "convert": read_hf,
    "--init-from": lambda path: StoredWeights(path, CONFIG),
}


@pytest.mark.parametrize("reader", READERS)
def test_a_reward_model_is_no_language_model(tmp_path: Path, reader: str) -> None:
    write_reward_model(tmp_path)
    with pytest.raises(ERRORS, match=r"is a reward model, .*; give a language model's directory"):
        READERS[reader](tmp_path)


@pytest.mark.parametrize("command", ["generate", "chat", "evaluate", "train"])
def test_commands_refuse_a_reward_model_in_one_line(
    tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_reward_model(tmp_path / "r")
    text = tmp_path / "text.txt"
    text.write_text("A llama. " * 200)
    ckpt = ["--ckpt", str(tmp_path / "r"), "--device", "cpu"]
    main, argv = {
        "generate": (generate.main, [*ckpt, "--prompt", "x"]),
        "chat": (chat.main, ckpt),
        "evaluate": (evaluate.main, [*ckpt, "--data", str(text)]),
        "train": (
            train.main,
            ["--init-from", str(tmp_path / "r"), "--data", str(text), "--out", str(tmp_path / "o")],
        ),
    }[command]
    assert main(argv) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert "is a reward model, which scores answers and writes none" in error
    assert not (tmp_path / "o").exists()


def test_a_language_model_is_no_reward_model(tmp_path: Path) -> None:
    model = Llama(CONFIG)
    model.init_weights(torch.Generator().manual_seed(0))
    write_directory_files(tmp_path, CONFIG)
    save_model(tmp_path, CONFIG, model.state_dict())
    with pytest.raises(ERRORS, match=rf"is no reward model, which has a head {SCORE}"):
        load_reward_model(tmp_path)


def test_the_head_is_no_tied_embedding() -> None:
    model = RewardModel(CONFIG)
    assert model.has_own_head
    assert model.head_weight.shape == (1, CONFIG.dim)
    assert model.head(torch.ones(2, 3, CONFIG.dim)).shape == (2, 3, 1)
    parts = [p for part in model.parts() for p in part.parameters()]
    assert [id(p) for p in parts] == [id(p) for p in model.parameters()]
