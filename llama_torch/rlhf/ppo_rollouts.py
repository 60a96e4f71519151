"""Draw answers from the policy in training, score them, and make windows of them to learn from.

Suffixes: R answers of this process that are drawn together, T position, P drawn tokens, D dim.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from llama_common.errors import InputError

from ..distributed.parallel import Parallel
from ..inference.config import SamplingConfig
from ..model.drawn_loss import log_probs
from ..model.llama import Llama
from ..model.loss import IGNORE_INDEX
from ..ppo_config import PpoConfig
from ..training.compile import uncompiled
from .answers import Answer, draw_answers
from .ppo_objective import Field, values_at
from .ppo_rewards import gae, gathered, group_advantages, kl_rewards, whiten
from .prompts import TokenisedPrompt
from .scoring import BATCH_TOKENS, Scorer, score_answers

NOT_FINITE = {"policy": "lower --lr", "reference": "try another --reference-dtype"}


class Drawn(NamedTuple):
    """R answers, and what the models say of them; padded on the right, on the CPU."""

    tokens: Tensor  # int64 [R, T], of prompt and answer but the last one
    targets: Tensor  # int64 [R, T]: the next token where it was drawn, else IGNORE_INDEX
    # float64 [R, T], at the positions before the drawn tokens; elsewhere 0.
    sampled: Tensor  # log-probabilities, as the sampler has them
    log_p: Tensor  # as the trainer has them
    entropy: Tensor
    log_reference: Tensor
    values: Tensor  # 0 without a value function
    # float64 [R].
    scores: Tensor
    ended: Tensor  # 1 where an end token ended the answer

    @property
    def mask(self) -> Tensor:
        """Whether a position's next token was drawn."""
        return self.targets != IGNORE_INDEX


@dataclass(frozen=True)
class Rollouts:
    """The policy, the frozen models, and how answers are drawn."""

    config: PpoConfig
    model: Llama  # the policy, whose weights change between calls
    value_head: Tensor | None
    reference: Llama
    helpful: Scorer
    safe: Scorer | None
    end_ids: Collection[int]

    def draw(self, prompts: Sequence[TokenisedPrompt], seeds: Sequence[int]) -> Drawn:
        """Draw an answer to each prompt, with a seed of its own, and have all models read it."""
        answers = self._answers(prompts, seeds)
        scores_R = score_answers(prompts, answers, self.helpful, self.safe).rewards
        ended_R = torch.tensor([answer.is_ended for answer in answers]).double()
        scores_R = scores_R - self.config.unended_penalty * (1 - ended_R)
        tokens_RT, targets_RT, sampled_RT = grid([p.ids for p in prompts], answers)
        log_p_RT, entropy_RT, values_RT = self._read(self.model, tokens_RT, targets_RT)
        log_reference_RT, _, _ = self._read(self.reference, tokens_RT, targets_RT)
        given = tokens_RT, targets_RT, sampled_RT, log_p_RT, entropy_RT, log_reference_RT
        return Drawn(*given, values_RT, scores_R, ended_R)

    def _answers(self, prompts: Sequence[TokenisedPrompt], seeds: Sequence[int]) -> list[Answer]:
        config = self.config
        limit, temperature = config.max_new_tokens, config.temperature
        settings = [SamplingConfig(limit, temperature, top_p=1.0, seed=seed) for seed in seeds]
        is_cuda = self.model.head_weight.is_cuda
        with uncompiled():
            drawn = draw_answers(
                self.model,
                [prompt.ids for prompt in prompts],
                settings,
                self.end_ids,
                config.sample_rows,
                # Other modes on a CPU are chosen by their time: a resumed run might choose another.
                decoding="auto" if is_cuda else "eager",
            )
            return sorted(drawn, key=lambda answer: answer.prompt)

    @torch.no_grad()
    def _read(self, model: Llama, tokens_RT: Tensor, targets_RT: Tensor) -> Sequence[Tensor]:
        """Return log-probabilities, entropies and values at the positions of targets, [R, T]."""
        device = model.head_weight.device
        found = [torch.zeros(targets_RT.shape, dtype=torch.float64) for _ in range(3)]
        is_policy = model is self.model and self.value_head is not None
        with uncompiled():
            for rows, width in like_lengths(targets_RT):
                mask = targets_RT[rows, :width] != IGNORE_INDEX
                tokens = tokens_RT[rows, :width]
                hidden, _ = model(tokens.to(device), project=False)
                hidden_PD = hidden[mask.to(device)]
                targets_P = targets_RT[rows, :width][mask].to(device)
                log_p_P, entropy_P = log_probs(
                    hidden_PD, model.head_weight, targets_P, self.config.temperature
                )
                parts = [log_p_P, entropy_P]
                if is_policy and self.value_head is not None:
                    parts.append(values_at(hidden_PD, self.value_head))
                for whole, part in zip(found, parts, strict=False):
                    values = torch.zeros(mask.shape, dtype=torch.float64)
                    values[mask] = part.double().cpu()
                    whole[rows, :width] = values
        if not all(x.isfinite().all() for x in found):
            whose = "policy" if model is self.model else "reference"
            raise InputError(f"the {whose}'s logits are not finite; {NOT_FINITE[whose]}")
        return found


def like_lengths(targets_RT: Tensor) -> Iterator[tuple[Tensor, int]]:
    """Yield numbers of answers of like lengths, and the positions that the longest one takes.

    They have BATCH_TOKENS tokens with their padding, or are one answer.
    """
    last_R = ((targets_RT != IGNORE_INDEX) * torch.arange(targets_RT.shape[1])).amax(1)
    order_R = last_R.argsort(descending=True, stable=True)
    while len(order_R):
        width = int(last_R[order_R[0]]) + 1
        count = max(1, BATCH_TOKENS // width)
        yield order_R[:count], width
        order_R = order_R[count:]


def grid(
    prompts: Sequence[Sequence[int]], answers: Sequence[Answer]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return tokens and targets, int64 [R, T], and the sampler's log-probabilities, float64."""
    rows = [[*prompt, *answer.ids] for prompt, answer in zip(prompts, answers, strict=True)]
    shape = len(rows), max(map(len, rows)) - 1
    tokens_RT = torch.zeros(shape, dtype=torch.int64)
    targets_RT = torch.full(shape, IGNORE_INDEX)
    sampled_RT = torch.zeros(shape, dtype=torch.float64)
    for i, (ids, prompt, answer) in enumerate(zip(rows, prompts, answers, strict=True)):
        tokens_RT[i, : len(ids) - 1] = torch.tensor(ids[:-1])
        # The position of a prompt's last token draws the answer's first.
        place = slice(len(prompt) - 1, len(ids) - 1)
        targets_RT[i, place] = torch.tensor(answer.ids)
        sampled_RT[i, place] = torch.tensor(answer.log_probs, dtype=torch.float64)
    return tokens_RT, targets_RT, sampled_RT


def advantages_of(drawn: Drawn, config: PpoConfig, parallel: Parallel) -> tuple[Tensor, Tensor]:
    """Return advantages and returns, float64 [R, T]. Collective: moments are of all processes.

    With groups, the answers to a prompt follow each other, and there are no returns.
    """
    mask_RT = drawn.mask
    scores_R = whiten(drawn.scores, torch.ones_like(drawn.scores, dtype=torch.bool), parallel)
    beta = config.kl_weight if config.kl == "reward" else 0.0
    given = scores_R, drawn.log_p, drawn.log_reference, mask_RT, beta
    rewards_RT = kl_rewards(*given)
    if config.advantages == "group":
        rewards_RG = rewards_RT.sum(1).view(-1, config.group)
        advantages_RT = group_advantages(rewards_RG).flatten()[:, None] * mask_RT
        return advantages_RT, torch.zeros_like(advantages_RT)
    advantages_RT, returns_RT = gae(rewards_RT, drawn.values, mask_RT, config.gamma, config.lam)
    if config.whiten_advantages:
        advantages_RT = whiten(advantages_RT, mask_RT, parallel)
    return advantages_RT, returns_RT


def to_windows(drawn: Drawn, advantages_RT: Tensor, returns_RT: Tensor, mismatch: float) -> Tensor:
    """Return windows, float64 [R, 10, T], whose rows are those of Field."""
    lengths_R = drawn.mask.sum(1)
    per_answer = [
        *(drawn.scores, drawn.ended, drawn.entropy.sum(1) / lengths_R),
        torch.full_like(drawn.scores, mismatch),
    ]
    rows = [
        *(drawn.tokens.double(), drawn.targets.double(), drawn.log_p),
        *(drawn.log_reference, advantages_RT, returns_RT),
        *(one[:, None].expand_as(advantages_RT) for one in per_answer),
    ]
    assert len(rows) == len(Field)
    return torch.stack(rows, 1)


def largest_mismatch(drawn: Drawn, parallel: Parallel) -> float:
    """Return the largest difference of the sampler's and the trainer's log-probabilities.

    Of all processes; collective.
    """
    own = (drawn.sampled - drawn.log_p).abs().max()
    return gathered(own[None], parallel).max().item()
