"""Take the training steps of TRL's SFTTrainer, one at a time."""

import tempfile
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llama_torch.config import TrainConfig
from llama_torch.model.loss import IGNORE_INDEX

ENDLESS = 1_000_000  # epochs, of one step each


def trl_step(
    peer: Any, rows: Tensor, answer_from: int, context: int, config: TrainConfig
) -> Callable[[], Tensor]:
    """Return a function that takes one step of TRL's trainer and returns its loss.

    peer         transformers' model.
    rows         conversations, int64 [N, S]; a step learns all of them from token
                 ``answer_from`` on.
    context      tokens of a packed row; TRL joins the rows of a step.

    The trainer runs in a thread of its own that waits between steps.
    """
    import datasets
    import transformers
    import trl

    go, done, losses = threading.Semaphore(0), threading.Semaphore(0), list[float]()

    class Gate(transformers.TrainerCallback):
        """Waits before each step, and says when one is done."""

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            go.acquire()

        def on_log(self, *given: Any, logs: Any = None, **__: Any) -> None:
            if "loss" in logs:
                losses.append(float(logs["loss"]))
                done.release()

    labels = rows.clone()
    labels[:, :answer_from] = IGNORE_INDEX  # each stands beside its own token
    columns = {"input_ids": rows.tolist(), "labels": labels.tolist()}
    trainer = trl.SFTTrainer(
        model=peer,
        args=_settings(config, next(peer.parameters()), rows.numel() // context, context),
        train_dataset=datasets.Dataset.from_dict(columns),
        processing_class=_tokenizer(peer.config.vocab_size),
        callbacks=[Gate()],
    )
    thread = threading.Thread(target=trainer.train, daemon=True)

    def step() -> Tensor:
        if not thread.is_alive():
            thread.start()
        go.release()
        done.acquire()
        return torch.tensor(losses[-1])

    return step


def _settings(config: TrainConfig, weights: Tensor, batch_size: int, context: int) -> Any:
    """Return TRL's settings of our step: packed rows, and nothing computed twice."""
    import trl

    return trl.SFTConfig(
        output_dir=tempfile.mkdtemp(),
        packing=True,
        max_length=context,
        per_device_train_batch_size=batch_size,
        num_train_epochs=ENDLESS,
        learning_rate=config.optim.lr,
        adam_beta2=config.optim.beta2,
        adam_epsilon=config.optim.adam_eps,
        weight_decay=config.optim.weight_decay,
        max_grad_norm=config.optim.grad_clip,
        lr_scheduler_type="constant",
        bf16=config.dtype == "bfloat16" and weights.dtype == torch.float32,
        activation_checkpointing=False,
        use_cpu=weights.device.type == "cpu",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def _tokenizer(vocab_size: int) -> Any:
    """Return a tokenizer that TRL asks for an end token; nothing is tokenised with it."""
    import tokenizers
    import transformers

    words = {"<unk>": 0, "</s>": 1}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="</s>", pad_token="</s>"
    )
