"""TRL, a third voice on fine-tuning: what is learnt, how it is packed, and the loss of a step."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from llama_torch.checkpoint.hf import load_model
from llama_torch.model.config import ModelConfig
from llama_torch.tokenizer.answers import answer_segments
from llama_torch.tokenizer.chat_template import load_jinja
from llama_torch.tokenizer.loading import load_tokenizer
from llama_torch.training.labels import Examples, PackedWindows, packed_batch
from llama_torch.training.objective import TokenLoss
from llama_torch.training.step import accumulate
from reference_np.ops import IGNORE

from ..backends.torch_model import write_model
from ..support.tokenizers import byte_level, turns, write_settings

# TRL finds the answers by these marks; what stands between them is learnt.
TEMPLATE = """{{ bos_token }}{% for m in messages %}{{ '<|head|>' + m['role'] + '<|/head|>' }}\\
{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|end|>' }}\\
{% endgeneration %}{% else %}{{ m['content'] + '<|end|>' }}{% endif %}{% endfor %}\\
{% if add_generation_prompt %}{{ '<|head|>assistant<|/head|>' }}{% endif %}""".replace("\\\n", "")
SAID = [["Sort 3 1", "1 3", "And 0?", "0 1 3"], ["Add 2 2", "4"], ["Count a a", "2"], ["Hi", "Hi"]]
CONTEXT = 64


@pytest.fixture
def model(tmp_path: Path) -> Path:
    write_model(tmp_path, ModelConfig(16, 1, 2, 1, 8, 24, 700, max_seq_len=CONTEXT), seed=1)
    byte_level(tmp_path)
    ends = {"bos_token": "<|begin|>", "eos_token": "<|end|>", "pad_token": "<|end|>"}
    write_settings(tmp_path, **ends, chat_template=TEMPLATE)
    return tmp_path


def trl_batch(model: Path, packing: bool) -> tuple[Any, dict[str, Any]]:
    """Return TRL's trainer and its batch of all conversations."""
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    data = datasets.Dataset.from_list([{"messages": turns(texts)} for texts in SAID])
    settings = trl.SFTConfig(
        output_dir=str(model / "trl"),
        assistant_only_loss=True,
        packing=packing,
        max_length=CONTEXT,
        per_device_train_batch_size=len(SAID),
        use_cpu=True,
        bf16=False,
        activation_checkpointing=False,
        shuffle_dataset=False,
        report_to="none",
    )
    trainer = trl.SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64),
        args=settings,
        train_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(model),
    )
    return trainer, next(iter(trainer.get_train_dataloader()))


def ours(model: Path) -> list[tuple[list[int], list[int]]]:
    """Return each conversation's tokens and labels, a label beside its own token."""
    tokenizer = load_tokenizer(model, 700)
    template = load_jinja(model, tokenizer)
    found = []
    for texts in SAID:
        segments = answer_segments(template, turns(texts))
        ids = [i for segment in segments for i in segment.ids]
        learnt = [segment.learnt for segment in segments for _ in segment.ids]
        found.append(
            (ids, [i if is_learnt else IGNORE for i, is_learnt in zip(ids, learnt, strict=True)])
        )
    return found


@pytest.mark.filterwarnings("ignore")  # of three libraries
@pytest.mark.parametrize("packing", [False, True])
def test_trl_learns_the_same_tokens_with_the_same_loss(model: Path, packing: bool) -> None:
    """The same labels, and the loss of a step over all conversations, packed or padded."""
    trainer, batch = trl_batch(model, packing)
    rows = zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True)
    theirs = []
    if packing:
        starts = [i for i, p in enumerate(batch["position_ids"][0].tolist()) if p == 0]
        (ids, labels) = next(rows)
        for begin, end in zip(starts, [*starts[1:], len(ids)], strict=True):
            theirs.append((ids[begin:end], labels[begin:end]))
    else:
        for (ids, labels), real in zip(rows, batch["attention_mask"].tolist(), strict=True):
            theirs.append((ids[: sum(real)], labels[: sum(real)]))
    # Both orders are the packers' own.
    assert sorted(theirs) == sorted(ours(model))
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model, dict(batch)).item()
    llama = load_model(model, dtype=torch.float64)
    tokenizer = load_tokenizer(model, 700)
    template = load_jinja(model, tokenizer)
    examples = Examples.of(answer_segments(template, turns(texts)) for texts in SAID)
    windows = PackedWindows(examples, CONTEXT)
    batches = [packed_batch(windows[number][None]) for number in range(len(windows))]
    assert len(batches) > 1
    found, _ = accumulate(llama, batches, TokenLoss())
    # TRL's head gives float32 log-probabilities.
    assert loss == pytest.approx(found.item(), rel=1e-6)
    assert json.loads((model / "config.json").read_text())["vocab_size"] == 700
