"""Take the training step of llama_torch's reward model, by the functions of its trainer."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from llama_torch.checkpoint.hf import load_reward_model
from llama_torch.config import OptimConfig
from llama_torch.model.reward import RewardModel
from llama_torch.training import pair_objective, pair_source, step
from llama_torch.training.batch import Batch
from llama_torch.training.optimizer import make_adamw
from llama_torch.training.pair_loading import tokenise
from reference_np.ops import Array
from reference_np.optim import Hyperparameters

from .reward_pairs import RewardInput


class TorchReward(NamedTuple):
    """llama_torch's reward model with the micro-batches of a training step."""

    path: Path
    dtype: torch.dtype
    device: torch.device
    batches: list[Batch]
    margin: str
    safety_weight: float

    def margins(self) -> list[Array]:
        """Return the margins [P] of each micro-batch."""
        table, column = self._objective().margins, pair_objective.Column.STRENGTH
        return [table[batch.targets[::2, column]].numpy() for batch in self.batches]

    def scores(self) -> list[Array]:
        """Return the scores [B] of each micro-batch."""
        model, found = self._model(), []
        with torch.no_grad():
            for batch in self.batches:
                on_device = batch.to(self.device)
                hidden, _ = model.model(on_device.tokens)
                found.append(self._objective().scores(hidden, model.head_weight, on_device))
        return [_array(scores) for scores in found]

    def loss_and_grads(self) -> tuple[float, dict[str, Array]]:
        """Return the step's loss, and its gradients by name."""
        model = self._model()
        loss, grads = step.accumulate(model, self.batches, self._objective())
        return loss.item(), {name: _array(grads[p]) for name, p in model.named_parameters()}

    def train(self, hyper: Hyperparameters) -> Mapping[str, Any]:
        """Return the gradient norm, the parameters and the moments after one step."""
        model = self._model()
        given = {name: value for name, value in vars(hyper).items() if name != "steps"}
        settings = OptimConfig(**given)
        optimizer = make_adamw(model, settings)
        _, norm = step.train_step(
            model,
            optimizer,
            self.batches,
            lr=hyper.lr,
            grad_clip=settings.grad_clip,
            objective=self._objective(),
        )
        named = dict(model.named_parameters())
        moments = {
            kind: {name: _array(optimizer.state[p][kind]) for name, p in named.items()}
            for kind in ("exp_avg", "exp_avg_sq")
        }
        return {
            "grad_norm": norm.item(),
            "params": {name: _array(p) for name, p in named.items()},
            **moments,
        }

    def _objective(self) -> pair_objective.PairLoss:
        return pair_objective.PairLoss(self.margin, self.safety_weight)

    def _model(self) -> RewardModel:
        torch.set_float32_matmul_precision("highest")
        model = load_reward_model(self.path, dtype=self.dtype, device=self.device)
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()  # it may be mapped from the file
        return model.train().requires_grad_(True)


def torch_reward(path: Path, dtype: str, device: str, given: RewardInput) -> TorchReward:
    """Return a directory's model, with the trainer's micro-batches of the pairs."""
    batches = [_batch(pairs, given.template) for pairs in given.pairs]
    return TorchReward(
        path,
        getattr(torch, dtype),
        torch.device(device),
        batches,
        given.margin,
        given.safety_weight,
    )


def _batch(pairs: Sequence[Any], template: Any) -> Batch:
    longest = 2**31  # each is known to fit
    windows = pair_source.PairWindows(tokenise(pairs, template, longest))
    return pair_source.pair_batch(torch.stack([windows[i] for i in range(len(windows))]))


def _array(value: Tensor) -> Array:
    found: Array = np.array(value.detach().cpu().numpy())
    return found
