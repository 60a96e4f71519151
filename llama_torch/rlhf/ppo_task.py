"""A run of reinforcement learning, as the training loop sees it."""

from pathlib import Path

import torch

from llama_common.errors import InputError
from llama_common.memory import gib

from ..checkpoint.hf import load_model, require_finite
from ..config import RunConfig
from ..distributed.parallel import Parallel
from ..model.llama import Llama
from ..model.policy import ValuedPolicy
from ..ppo_config import PpoConfig
from ..tokenizer.loading import load_tokenizer
from ..training.memory import Layout, gradient_and_moment_bytes
from ..training.objective import Objective
from ..training.origin import Origin
from ..training.source import BatchSource
from ..training.task import Task
from .ppo_objective import Field, PpoLoss
from .ppo_rollouts import Rollouts
from .ppo_source import RolloutSource, open_prompts
from .scoring import Scorer, are_equal, load_scorer


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
        reference = _load_reference(source, dtype, head.device)
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
            config,
            model,
            reference,
            scorers,
            max(len(prompt.ids) for prompt in prompts),
            parallel.data_size,
        )
        objective.value_head = value_head


def _load_reference(source: RolloutSource, dtype: torch.dtype, device: torch.device) -> Llama:
    """Return the frozen model; InputError where it cannot read the policy's tokens."""
    config = source.config
    directory = config.data.reference or config.init_from
    name = f"--reference {directory}"
    reference = load_model(directory, dtype=dtype, device=device)
    require_finite(reference, name)
    own, other = config.model.vocab_size, reference.config.vocab_size
    if own != other:
        raise InputError(
            f"{name}: has {other:,} tokens and --init-from {own:,}; give a model with the same "
            "tokenizer"
        )
    if not are_equal(load_tokenizer(Path(directory), other), source.template.tokenizer):
        raise InputError(
            f"{name}: its tokenizer has other tokens than that of --init-from; give a model with "
            "the same"
        )
    if source.most > (context := reference.config.max_seq_len):
        raise InputError(
            f"{name}: a prompt with its answer takes {source.most:,} tokens and its context holds "
            f"{context:,}; ask for fewer --max-new-tokens, or give another"
        )
    return reference.requires_grad_(False)


def describe_memory(
    config: PpoConfig,
    model: Llama,
    reference: Llama,
    scorers: list[Scorer],
    longest: int,
    n_processes: int,
) -> str:
    """Return a line on what a process holds, in GiB: weights, moments, gradients, answers."""
    n = sum(parameter.numel() for parameter in model.parameters())
    moved = gradient_and_moment_bytes(config, Layout(data_size=n_processes))
    drawn = config.rollout_batch // n_processes
    tokens, shape = longest + config.max_new_tokens, model.config
    row = 2 * shape.n_layers * shape.n_kv_heads * shape.head_dim * tokens
    rewards = sum(_bytes(scorer.model) for scorer in scorers)
    parts = {
        "policy": 4 * n,
        "gradients and moments": moved * n,
        "reference": _bytes(reference),
        "reward models" if len(scorers) > 1 else "reward model": rewards,
        "cache of answers that are drawn": (
            min(config.sample_rows, drawn) * row * model.head_weight.itemsize
        ),
        "answers that are learnt": 8 * len(Field) * drawn * tokens,
    }
    sizes = ", ".join(f"{name} {gib(size, 2)}" for name, size in parts.items())
    return f"memory: {sizes}; activations besides"


def _bytes(model: Llama) -> int:
    return sum(p.numel() * p.itemsize for p in model.parameters())
