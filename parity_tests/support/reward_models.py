"""Write small models that answer, and reward models that score, with random weights."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from llama_common.files import write_json
from llama_torch.checkpoint.hf import save_model
from llama_torch.model.config import REWARD_KEYS, ModelConfig
from llama_torch.model.llama import Llama
from llama_torch.model.reward import RewardModel
from llama_torch.tokenizer.loading import load_tokenizer
from reference_np.config import LlamaConfig
from reference_np.model import forward
from reference_np.reward import score_at

from . import tokenizers


def write_policy(folder: Path, kind: str, config: ModelConfig, seed: int = 0) -> Path:
    """Write a model of float64 whose answers end after some tokens; return its folder.

    The first dimension of its stream is the same for all tokens, so that the end token's row of
    the head can raise that one everywhere.
    """
    folder.mkdir(parents=True)
    model = Llama(config).double()
    model.init_weights(torch.Generator().manual_seed(seed))
    tensors = {name: 10 * p.detach() for name, p in model.named_parameters() if p.ndim > 1}
    tensors |= {name: p.detach() for name, p in model.named_parameters() if p.ndim == 1}
    tokenizers.KINDS[kind](folder)
    tokenizer = load_tokenizer(folder, config.vocab_size)
    tensors["model.embed_tokens.weight"][:, 0] = 1
    tensors["lm_head.weight"][tokenizer.special[tokenizer.eos or ""], 0] = 2.2
    save_model(folder, config, tensors)
    write_json(folder / "config.json", config.to_hf())
    return folder


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
    save_model(folder, config, tensors | {"score.weight": 8 * tensors["score.weight"]})
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
