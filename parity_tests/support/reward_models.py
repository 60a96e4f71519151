"""Write small reward models with random weights, and score with them by the oracle."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from llama_common.files import write_json
from llama_torch.checkpoint.hf import save_model
from llama_torch.model.config import REWARD_KEYS, ModelConfig
from llama_torch.model.reward import RewardModel
from reference_np.config import LlamaConfig
from reference_np.model import forward
from reference_np.reward import score_at

from . import tokenizers


def write_reward_model(
    folder: Path, kind: str, config: ModelConfig, seed: int = 0, template: str = ""
) -> Path:
    """Write a reward model of float64 with a tokenizer of that kind; return its folder.

    Its head is wide enough for scores of some units. ``template`` is a Jinja source in place of
    the tokenizer's own.
    """
    folder.mkdir(parents=True)
    model = RewardModel(config).double()
    model.init_weights(torch.Generator().manual_seed(seed))
    tensors = {name: 5 * p.detach() for name, p in model.named_parameters()}
    tokenizers.KINDS[kind](folder)
    save_model(folder, config, tensors | {"score.weight": 40 * tensors["score.weight"]})
    write_json(folder / "config.json", config.to_hf() | REWARD_KEYS)
    if template:
        (folder / "chat_template.jinja").write_text(template)
    return folder


def oracle_scores(model: RewardModel, rows: Sequence[Sequence[int]]) -> list[float]:
    """Return the oracle's score of each row of ids, run by itself.

    Its head of a vocabulary has the reward model's as its first row.
    """
    c = model.config
    sizes = c.dim, c.n_layers, c.n_heads, c.n_kv_heads, c.head_dim, c.hidden_dim, c.vocab_size
    config = LlamaConfig(*sizes, c.max_seq_len, c.norm_eps, c.rope_theta, False)
    params = {name: p.detach().numpy() for name, p in model.named_parameters()}
    head = np.zeros((c.vocab_size, c.dim))
    head[0] = params.pop("score.weight")[0]
    params["lm_head.weight"] = head
    found = []
    for row in rows:
        values = forward(params, np.array([row]), config)[0][:, :, 0]
        found.append(float(score_at(values, np.ones(values.shape, bool))[0]))
    return found
