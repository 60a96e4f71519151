"""Take the training steps of TRL's SFTTrainer and RewardTrainer, one at a time."""

import tempfile
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from llama_torch.config import TrainConfig
from llama_torch.model.loss import IGNORE_INDEX

ENDLESS = 1_000_000  # epochs, of one step each
PAD = 1  # the id of padding, which no conversation of a pair has


def trl_step(
    peer: Any, rows: Tensor, answer_from: int, context: int, config: TrainConfig
) -> Callable[[], Tensor]:
    """Return a function that takes one step of TRL's trainer and returns its loss.

    peer         transformers' model.
    rows         conversations, int64 [N, S]; a step learns all of them from token
                 ``answer_from`` on.
    context      tokens of a packed row; TRL joins the rows of a step.
    """
    import datasets
    import trl

    labels = rows.clone()
    labels[:, :answer_from] = IGNORE_INDEX  # each stands beside its own token
    columns = {"input_ids": rows.tolist(), "labels": labels.tolist()}
    settings = trl.SFTConfig(
        packing=True,
        max_length=context,
        per_device_train_batch_size=rows.numel() // context,
        activation_checkpointing=False,
        **_settings(config, next(peer.parameters())),
    )
    return _one_at_a_time(
        lambda gate: trl.SFTTrainer(
            model=peer,
            args=settings,
            train_dataset=datasets.Dataset.from_dict(columns),
            processing_class=_tokenizer(),
            callbacks=[gate],
        )
    )


def trl_reward_step(
    peer: Any,
    rows: Sequence[Sequence[int]],
    margins: Sequence[float],
    batch_size: int,
    config: TrainConfig,
) -> Callable[[], Tensor]:
    """Return a function that takes one step of TRL's trainer of reward models, as ``trl_step``.

    peer        transformers' model with one label.
    rows        conversations of pairs, the chosen one of each first; a step learns all of them.
    margins     of each pair.
    batch_size  pairs of a micro-batch.
    """
    import datasets
    import trl

    columns = {"chosen_ids": rows[::2], "rejected_ids": rows[1::2], "margin": margins}
    settings = trl.RewardConfig(
        max_length=None,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=len(margins) // batch_size,
        gradient_checkpointing=False,
        **_settings(config, next(peer.parameters())),
    )
    return _one_at_a_time(
        lambda gate: trl.RewardTrainer(
            model=peer,
            args=settings,
            train_dataset=datasets.Dataset.from_dict(columns),
            processing_class=_tokenizer(),
            callbacks=[gate],
        )
    )


def _one_at_a_time(make: Callable[[Any], Any]) -> Callable[[], Tensor]:
    """Return a function that takes one step of a trainer and returns its loss.

    make  given a callback, returns the trainer, which runs in a thread of its own and waits
          between steps.
    """
    import transformers

    go, done, losses = threading.Semaphore(0), threading.Semaphore(0), list[float]()

    class Gate(transformers.TrainerCallback):
        """Waits before each step, and says when one is done."""

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            go.acquire()

        def on_log(self, *given: Any, logs: Any = None, **__: Any) -> None:
            if "loss" in logs:
                losses.append(float(logs["loss"]))
                done.release()

    thread = threading.Thread(target=make(Gate()).train, daemon=True)

    def step() -> Tensor:
        if not thread.is_alive():
            thread.start()
        go.release()
        done.acquire()
        return torch.tensor(losses[-1])

    return step


def _settings(config: TrainConfig, weights: Tensor) -> dict[str, Any]:
    """Return TRL's settings of our step."""
    return {
        "output_dir": tempfile.mkdtemp(),
        "num_train_epochs": ENDLESS,
        "learning_rate": config.optim.lr,
        "adam_beta2": config.optim.beta2,
        "adam_epsilon": config.optim.adam_eps,
        "weight_decay": config.optim.weight_decay,
        "max_grad_norm": config.optim.grad_clip,
        "lr_scheduler_type": "constant",
        "bf16": config.dtype == "bfloat16" and weights.dtype == torch.float32,
        "use_cpu": weights.device.type == "cpu",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def _tokenizer() -> Any:
    """Return a tokenizer that TRL asks for end and padding; nothing is tokenised with it."""
    import tokenizers
    import transformers

    words = {"<unk>": 0, "</s>": PAD}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="</s>", pad_token="</s>"
    )
