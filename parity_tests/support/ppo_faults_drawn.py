"""Faults of what a PPO loop draws, scores and turns into advantages, planted into it.

Each is a function that changes the code through a monkeypatch; its first line says what is wrong
then.
"""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from llama_torch.model import drawn_loss
from llama_torch.model.loss import IGNORE_INDEX
from llama_torch.rlhf import ppo_objective, ppo_rollouts, ppo_source, scoring
from llama_torch.rlhf.ppo_objective import Field, PolicyTerms
from llama_torch.rlhf.ppo_rollouts import Rollouts
from llama_torch.rlhf.ppo_source import RolloutSource

Patch = pytest.MonkeyPatch


def wrapped(patch: Patch, owner: Any, name: str, change: Callable[..., Any]) -> None:
    """Replace a function by ``change``, which is given the function before its arguments."""
    real = getattr(owner, name)
    patch.setattr(owner, name, lambda *given, **more: change(real, *given, **more))


def stale_rollouts(patch: Patch) -> None:
    """Answers and their old log-probabilities are of the first batch's weights."""
    kept: list[Any] = []

    def change(real: Any, self: Rollouts, *given: Any) -> Any:
        kept.append(kept[0] if kept else copy.deepcopy(self.model))
        object.__setattr__(self, "model", kept[0])
        return real(self, *given)

    wrapped(patch, Rollouts, "draw", change)


def stale_sampler(patch: Patch) -> None:
    """The sampler keeps a copy of the first weights; the trainer's log-probabilities are new."""
    kept: list[Any] = []

    def change(real: Any, model: Any, *given: Any, **more: Any) -> Any:
        kept.append(kept[0] if kept else copy.deepcopy(model))
        return real(kept[0], *given, **more)

    wrapped(patch, ppo_rollouts, "draw_answers", change)


def temperature_left_out(patch: Patch) -> None:
    """Log-probabilities are of temperature 1, the tokens are not."""

    def change(real: Any, hidden: Tensor, head: Tensor, temperature: float) -> Any:
        return real(hidden, head, 1.0)

    wrapped(patch, drawn_loss, "_logits", change)


def reference_follows(patch: Patch) -> None:
    """The reference is the policy itself, and moves with it."""

    def change(real: Any, self: Rollouts, model: Any, *given: Any) -> Any:
        return real(self, self.model, *given)

    wrapped(patch, Rollouts, "_read", change)


def kl_added(patch: Patch) -> None:
    """The divergence is added to the reward."""

    def change(real: Any, scores: Tensor, p: Tensor, ref: Tensor, mask: Tensor, beta: float) -> Any:
        return real(scores, p, ref, mask, -beta)

    wrapped(patch, ppo_rollouts, "kl_rewards", change)


def score_late(patch: Patch) -> None:
    """The score is given one slot after the end token."""

    def change(real: Any, scores: Tensor, p: Tensor, ref: Tensor, mask: Tensor, beta: float) -> Any:
        found = real(scores, p, ref, mask, beta)
        own = real(torch.zeros_like(scores), p, ref, mask, beta)
        late: Tensor = own + (found - own).roll(1, 1)
        return late

    wrapped(patch, ppo_rollouts, "kl_rewards", change)


def score_not_whitened(patch: Patch) -> None:
    """The reward is the score itself."""

    def change(real: Any, values: Tensor, *given: Any) -> Any:
        return values if values.ndim == 1 else real(values, *given)

    wrapped(patch, ppo_rollouts, "whiten", change)


def advantages_not_whitened(patch: Patch) -> None:
    """Advantages stay as they are where they were to be whitened."""

    def change(real: Any, values: Tensor, *given: Any) -> Any:
        return values if values.ndim == 2 else real(values, *given)

    wrapped(patch, ppo_rollouts, "whiten", change)


def whitened_with_padding(patch: Patch) -> None:
    """The moments of advantages count padded slots."""

    def change(real: Any, values: Tensor, mask: Tensor, parallel: Any) -> Any:
        return real(values, torch.ones_like(mask), parallel) * mask

    wrapped(patch, ppo_rollouts, "whiten", change)


def whitened_by_minibatch(patch: Patch) -> None:
    """Each minibatch is whitened by its own moments."""

    def change(real: Any, values: Tensor, mask: Tensor, parallel: Any) -> Any:
        parts = zip(values.chunk(3), mask.chunk(3), strict=True)
        return torch.cat([real(*part, parallel) for part in parts])

    wrapped(patch, ppo_rollouts, "whiten", change)


def advantages_after_updates(patch: Patch) -> None:
    """Advantages are computed anew for each minibatch, of the values after the last update."""

    def change(real: Any, self: RolloutSource, *given: Any) -> Iterator[Tensor]:
        kept: list[Any] = []

        def keeping(real: Any, drawn: Any, *others: Any) -> Any:
            kept.append(drawn)
            return real(drawn, *others)

        with pytest.MonkeyPatch.context() as inner:
            wrapped(inner, ppo_source, "advantages_of", keeping)
            parts = real(self, *given)
        assert self.rollouts
        for i, part in enumerate(parts):
            read = self.rollouts._read(self.rollouts.model, kept[0].tokens, kept[0].targets)
            drawn = kept[0]._replace(values=read[2])
            learnt = ppo_rollouts.advantages_of(drawn, self.config, self.parallel)
            anew = ppo_rollouts.to_windows(drawn, *learnt, 0.0).chunk(len(parts))[i]
            own = ppo_source.longest_first(anew)
            part[:, Field.ADVANTAGE] = own[:, Field.ADVANTAGE]
            part[:, Field.RETURN] = own[:, Field.RETURN]
            yield part

    wrapped(patch, RolloutSource, "_draw", change)


def old_after_update(patch: Patch) -> None:
    """Old log-probabilities are those of the policy that is updated: the ratio is always 1."""

    def change(real: Any, self: PolicyTerms, log_p: Tensor, part: slice) -> Any:
        self.old_P[part] = log_p.double()
        return real(self, log_p, part)

    wrapped(patch, PolicyTerms, "_objectives", change)


def value_after_the_token(patch: Patch) -> None:
    """A token's value is that of the position behind it."""

    def change(real: Any, self: Rollouts, model: Any, tokens: Tensor, targets: Tensor) -> Any:
        log_p, entropy, values = real(self, model, tokens, targets)
        return log_p, entropy, values.roll(-1, 1)

    wrapped(patch, Rollouts, "_read", change)


def value_of_the_last_token(patch: Patch) -> None:
    """The value loss is of the hidden states one position earlier than the policy's."""

    def change(real: Any, hidden: Tensor, head: Tensor) -> Tensor:
        found: Tensor = real(hidden, head).roll(1)
        return found

    wrapped(patch, ppo_objective, "values_at", change)


def _regrid(patch: Patch, change: Callable[[Tensor, Tensor, Any, Any], None]) -> None:
    def changed(real: Any, prompts: Any, answers: Any) -> Any:
        tokens, targets, sampled = real(prompts, answers)
        change(tokens, targets, prompts, answers)
        return tokens, targets, sampled

    wrapped(patch, ppo_rollouts, "grid", changed)


def prompt_learnt(patch: Patch) -> None:
    """The prompt's tokens count as drawn."""

    def change(tokens: Tensor, targets: Tensor, prompts: Any, answers: Any) -> None:
        for row, prompt in enumerate(prompts):
            targets[row, : len(prompt) - 1] = tokens[row, 1 : len(prompt)]

    _regrid(patch, change)


def first_token_left_out(patch: Patch) -> None:
    """The answer's first token is not learnt."""

    def change(tokens: Tensor, targets: Tensor, prompts: Any, answers: Any) -> None:
        for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            if len(answer.ids) > 1:
                targets[row, len(prompt) - 1] = IGNORE_INDEX

    _regrid(patch, change)


def end_left_out(patch: Patch) -> None:
    """The end token is not learnt, as if it were padding."""

    def change(tokens: Tensor, targets: Tensor, prompts: Any, answers: Any) -> None:
        for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            if answer.is_ended and len(answer.ids) > 1:
                targets[row, len(prompt) + len(answer.ids) - 2] = IGNORE_INDEX

    _regrid(patch, change)


def cut_answers_unpunished(patch: Patch) -> None:
    """An answer that was cut counts as ended."""

    def change(real: Any, *given: Any) -> Any:
        return [answer._replace(is_ended=True) for answer in real(*given)]

    wrapped(patch, Rollouts, "_answers", change)


def policys_template(patch: Patch) -> None:
    """The reward model reads the policy's ids, which its tokenizer does not have."""

    def change(real: Any, self: Any, prompt: Any, answer: Any) -> list[int]:
        vocabulary = self.model.config.vocab_size
        return [id_ % vocabulary for id_ in (*prompt.ids, *answer.ids)]

    wrapped(patch, ppo_rollouts, "score_answers", _with(scoring.Scorer, "encode", change))


def _with(owner: Any, name: str, change: Callable[..., Any]) -> Callable[..., Any]:
    """Return a wrapper that runs a function with another changed: the oracle's own calls stay."""

    def run(real: Any, *given: Any) -> Any:
        with pytest.MonkeyPatch.context() as inner:
            wrapped(inner, owner, name, change)
            return real(*given)

    return run


def scores_of_others(patch: Patch) -> None:
    """Scores are in the order in which the answers ended, not in that of their prompts."""

    def change(real: Any, prompts: Any, answers: Any, *scorers: Any) -> Any:
        found = real(prompts, answers, *scorers)
        order = sorted(range(len(answers)), key=lambda i: len(answers[i].ids))
        return found._replace(rewards=found.rewards[order])

    wrapped(patch, ppo_rollouts, "score_answers", change)


def safety_ignored(patch: Patch) -> None:
    """The helpfulness score counts alone, though there is a safety model."""

    def change(real: Any, *given: Any) -> Any:
        found = real(*given)
        return found._replace(rewards=found.helpful)

    wrapped(patch, ppo_rollouts, "score_answers", change)


def group_of_others(patch: Patch) -> None:
    """A group holds one answer to each of several prompts."""

    def change(real: Any, rewards: Tensor) -> Any:
        across = rewards.flatten().view(rewards.shape[1], -1).T
        return real(across.contiguous()).T.contiguous().view(rewards.shape)

    wrapped(patch, ppo_rollouts, "group_advantages", change)


def group_unbiased(patch: Patch) -> None:
    """A group's deviation divides by n - 1."""

    def change(real: Any, rewards: Tensor) -> Any:
        n = rewards.shape[1]
        return real(rewards) * ((n - 1) / n) ** 0.5

    wrapped(patch, ppo_rollouts, "group_advantages", change)
