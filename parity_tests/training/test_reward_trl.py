"""TRL, a third voice on reward models: what is scored, and the loss of a step with its margins."""

from pathlib import Path
from typing import Any

import pytest
import torch

from llama_torch.checkpoint.hf import load_reward_model
from llama_torch.config import TrainConfig
from llama_torch.data.preferences import read_pairs
from llama_torch.model.config import ModelConfig
from llama_torch.model.llama import Llama
from llama_torch.tokenizer.chat_template import load_jinja
from llama_torch.tokenizer.loading import load_tokenizer
from llama_torch.training.pair_loading import tokenise
from llama_torch.training.pair_objective import MARGINS, PairLoss
from llama_torch.training.pair_source import pair_batch, pair_batches
from llama_torch.training.step import accumulate
from tools.benchmarks.reward_sides import ours_on_pairs, trl_on_pairs

from ..support.pairs import sums, write_pairs
from ..support.reward_models import write_reward_model
from ..support.tokenizers import HEADED, turns, write_settings

CONFIG = ModelConfig(16, 1, 2, 1, 8, 24, 700, max_seq_len=64)
RECORDS = sums(6)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = write_reward_model(tmp_path / "model", "bytes", CONFIG, seed=2)
    # transformers reads the score before the first padding: an end token that pads is none.
    ends = {"bos_token": "<|begin|>", "eos_token": "<|end|>", "pad_token": "<|begin|>"}
    write_settings(folder, **ends, chat_template=HEADED)
    return folder


def trl_batch(model: Path, margins: list[float]) -> tuple[Any, dict[str, Any]]:
    """Return TRL's trainer and its batch of all pairs."""
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    data = [
        {key: turns([record["prompt"], record[key]]) for key in ("chosen", "rejected")}
        | {"margin": margin}
        for record, margin in zip(RECORDS, margins, strict=True)
    ]
    settings = trl.RewardConfig(
        output_dir=str(model / "trl"),
        max_length=None,
        per_device_train_batch_size=len(RECORDS),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
    )
    trainer = trl.RewardTrainer(
        model=AutoModelForSequenceClassification.from_pretrained(model, dtype=torch.float64),
        args=settings,
        train_dataset=datasets.Dataset.from_list(data),
        processing_class=AutoTokenizer.from_pretrained(model),
    )
    return trainer, next(iter(trainer.get_train_dataloader()))


@pytest.mark.filterwarnings("ignore")  # of three libraries
def test_trl_scores_the_same_tokens_with_the_same_loss(model: Path, tmp_path: Path) -> None:
    """The same conversations, the same loss and gradients of all pairs, padded or in parts."""
    path = write_pairs(tmp_path / "pairs.jsonl", RECORDS)
    given = [*read_pairs([path])]
    template = load_jinja(model, load_tokenizer(model, CONFIG.vocab_size))
    pairs = tokenise(given, template, CONFIG.max_seq_len)
    margins = [MARGINS["large"][pair.strength] for pair in given]
    assert len({*margins}) > 2
    trainer, batch = trl_batch(model, margins)
    real = zip(batch["input_ids"].tolist(), batch["attention_mask"].sum(1).tolist(), strict=True)
    theirs = sorted(row[:n] for row, n in real)
    assert theirs == sorted(
        pairs.tokens[a:b].tolist() for a, b in zip(pairs.starts, pairs.starts[1:], strict=False)
    )
    loss = trainer.compute_loss(trainer.model, dict(batch))
    loss.backward()
    reward = load_reward_model(model, dtype=torch.float64).train()
    batches = [pair_batch(part) for part in pair_batches(pairs, 4)]
    assert len(batches) == 2
    found, grads = accumulate(reward, batches, PairLoss("large"))
    # transformers has norms and angles in float32.
    assert found.item() == pytest.approx(loss.item(), rel=1e-5)
    peer = dict(trainer.model.named_parameters())
    for name, parameter in reward.named_parameters():
        expected = peer[name].grad
        assert expected.any(), name
        error = (grads[parameter] - expected).abs().max() / expected.abs().max()
        assert error < 1e-4, name
    without, _ = accumulate(reward, batches, PairLoss("none"))
    assert without.item() != pytest.approx(loss.item(), rel=0.01)


@pytest.mark.filterwarnings("ignore")  # of three libraries
def test_the_benchmarks_sides_take_the_same_step() -> None:
    """bench.py compares their first losses; the second is of the updated weights."""
    pytest.importorskip("trl")
    model = ModelConfig(16, 1, 2, 1, 8, 24, 64, max_seq_len=16)
    config = TrainConfig(model=model, dtype="float32")
    found = []
    for side in (ours_on_pairs, trl_on_pairs):
        llama = Llama(model)
        llama.init_weights(torch.Generator().manual_seed(0))
        step = side(llama, torch.zeros(2, 17), config)
        found.append([step().item() for _ in range(2)])
    ours, trl = found
    assert trl == pytest.approx(ours, rel=1e-4)
    assert ours[0] != ours[1]
