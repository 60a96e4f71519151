"""The stages from a base model to a chat model, each one command, on the synthetic tasks."""

import shlex
from collections.abc import Sequence
from typing import NamedTuple

TASKS = "tasks"

DRAW_TASKS = """python tools/tasks.py {folder}/tasks --form-in every
    --conversations 12000 --pairs 16000 --prompts 2000"""

# The commands of a seed in order, by the name of what each makes in the seed's folder. Learning
# rates and numbers of rows are those of a model a thousand times as small as the paper's.
COMMANDS = {
    "base": "python -m llama_torch.train --sample-every 0",
    "sft": """python -m llama_torch.sft --init-from {own}/base --template llama2
        --data {tasks}/conversations.jsonl --val-data {tasks}/held-out-conversations.jsonl
        --lr 1e-3 {small_steps}""",
    "reward": """python -m llama_torch.reward --init-from {own}/sft
        --data {tasks}/pairs.jsonl --val-data {tasks}/held-out-pairs.jsonl
        --lr 3e-4 --batch-size 8 --grad-accum 8""",
    "best-of-8": """python -m llama_torch.rejection --model {own}/sft --reward {own}/reward
        --prompts {tasks}/prompts.jsonl --samples 8 --max-new-tokens 24""",
    "rejection": """python -m llama_torch.sft --init-from {own}/sft
        --data {own}/best-of-8/conversations.jsonl
        --val-data {tasks}/held-out-conversations.jsonl --epochs 1 --lr 3e-4 {small_steps}""",
    "ppo": """python -m llama_torch.ppo --init-from {own}/rejection --reward {own}/reward
        --data {tasks}/prompts.jsonl --val-data {tasks}/held-out-prompts.jsonl
        --rollout-batch 64 --batch-size 16 --grad-accum 1 --steps 96 --lr 2e-5
        --max-new-tokens 24""",
    "dialogues": """python -m llama_torch.gatt --model {own}/ppo --max-new-tokens 24
        --prompts {tasks}/dialogues.jsonl --instructions {tasks}/instructions.txt
        --place user --turns 4""",
    "gatt": """python -m llama_torch.sft --init-from {own}/ppo
        --data {own}/dialogues/conversations.jsonl {tasks}/conversations.jsonl
        --val-data {tasks}/held-out-conversations.jsonl --epochs 1 --lr 3e-4 {small_steps}""",
}
ANSWERING = ("base", "sft", "rejection", "ppo", "gatt")  # the models whose answers are measured
SMALL_STEPS = "--batch-size 8 --grad-accum 1 --eval-every 200 --save-every 1000 --sample-every 0"


class Stage(NamedTuple):
    """One command of the chain; ``name`` is of what it makes, in the folder of a seed."""

    name: str
    words: Sequence[str]


def tasks_words(folder: str) -> list[str]:
    """Return the command that draws the tasks, the same for all seeds."""
    return shlex.split(DRAW_TASKS.format(folder=shlex.quote(folder)))


def stages(folder: str, seed: int, device: str = "auto") -> list[Stage]:
    """Return the stages of a seed, in order: each begins from what those before it made."""
    own, tasks = (shlex.quote(f"{folder}/{name}") for name in (seed, TASKS))
    ending = f" --seed {seed}" + (f" --device {device}" if device != "auto" else "")
    return [
        Stage(
            name,
            shlex.split(
                line.format(own=own, tasks=tasks, small_steps=SMALL_STEPS)
                + f"{ending} --out {own}/{name}"
            ),
        )
        for name, line in COMMANDS.items()
    ]
