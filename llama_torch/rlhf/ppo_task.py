"""A run of reinforcement learning, as the training loop sees it."""

import torch

from llama_common.errors import InputError
from llama_common.memory import gib

from ..checkpoint.hf import load_model
from ..config import RunConfig
from ..distributed.parallel import Parallel
from ..model.llama import Llama
from ..model.policy import ValuedPolicy
from ..ppo_config import PpoConfig
from ..training.objective import Objective
from ..training.origin import Origin
from ..training.source import BatchSource
from ..training.task import Task
from .ppo_objective import Field, PpoLoss
from .ppo_rollouts import Rollouts
from .ppo_source import RolloutSource, open_prompts
from .scoring import Scorer, load_scorer


class PpoTask(Task):
    """Draws answers with the model in training, and learns from them."""

    def open_source(self, config: RunConfig, origin: Origin, parallel: Parallel) -> BatchSource:
        """Open the prompts of a run."""
        assert isinstance(config, PpoConfig)
        share, group = config.windows_per_step // parallel.data_size, config.answers_per_prompt
        with parallel.errors_on_main_only():
            if share % group:
                raise InputError(
                    f"--group {group}: {parallel.data_size} processes take {share} answers each of "
                    "a minibatch, which must be whole groups; choose a divisor of that"
                )
            return open_prompts(config, origin, parallel)

    def make_objective(self, config: RunConfig) -> Objective:
        """Return the losses of the policy and the value function."""
        assert isinstance(config, PpoConfig)
        return PpoLoss(config)

    def begin(
        self, source: BatchSource, objective: Objective, model: Llama, parallel: Parallel
    ) -> None:
        """Load the frozen models, and give the policy to what draws and what learns."""
        assert isinstance(source, RolloutSource)
        assert isinstance(objective, PpoLoss)
        config, head = source.config, model.head_weight
        asked = config.reference_dtype
        dtype = head.dtype if asked == "auto" else getattr(torch, asked)
        reference = _load_reference(config, model, dtype, head.device)
        names = {"--reward": config.data.reward, "--safety-reward": config.data.safety_reward}
        scorers = [
            load_scorer(name, source.template, flag, dtype=dtype, device=head.device)
            for flag, name in names.items()
            if name
        ]
        prompts = [*source.train, *source.val]
        for scorer in scorers:
            scorer.require_room(prompts, config.max_new_tokens)
        value_head = model.value.weight if isinstance(model, ValuedPolicy) else None
        helpful, safe = scorers[0], scorers[1] if len(scorers) > 1 else None
        given = config, model, value_head, reference, helpful, safe, source.end_ids
        source.rollouts = Rollouts(*given)
        source.memory = describe_memory(
            config, model, reference, scorers, max(len(prompt.ids) for prompt in prompts)
        )
        objective.value_head = value_head


def _load_reference(
    config: PpoConfig, model: Llama, dtype: torch.dtype, device: torch.device
) -> Llama:
    """Return the frozen model; InputError where it has not the policy's tokens."""
    directory = config.data.reference or config.init_from
    reference = load_model(directory, dtype=dtype, device=device)
    own, other = model.config.vocab_size, reference.config.vocab_size
    if own != other:
        raise InputError(
            f"--reference {directory}: has {other:,} tokens and --init-from {own:,}; give a model "
            "with the same tokenizer"
        )
    return reference.requires_grad_(False)


def describe_memory(
    config: PpoConfig, model: Llama, reference: Llama, scorers: list[Scorer], longest: int
) -> str:
    """Return a line on what a process holds, in GiB: weights, moments, gradients, answers."""
    n = sum(parameter.numel() for parameter in model.parameters())
    tokens, shape = longest + config.max_new_tokens, model.config
    row = 2 * shape.n_layers * shape.n_kv_heads * shape.head_dim * tokens
    rewards = sum(_bytes(scorer.model) for scorer in scorers)
    parts = {
        "policy": 4 * n,
        "gradients and moments": 12 * n,
        "reference": _bytes(reference),
        "reward models" if len(scorers) > 1 else "reward model": rewards,
        "cache of answers that are drawn": (
            min(config.sample_rows, config.rollout_batch) * row * model.head_weight.itemsize
        ),
        "answers that are learnt": 8 * len(Field) * config.rollout_batch * tokens,
    }
    sizes = ", ".join(f"{name} {gib(size, 2)}" for name, size in parts.items())
    return f"memory: {sizes}; activations besides"


def _bytes(model: Llama) -> int:
    return sum(p.numel() * p.itemsize for p in model.parameters())
