"""Compile and recompute a model's blocks: faster or smaller training steps, the same result."""

from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from llama_common.errors import InputError

from ..common.device import can_compile
from ..model.float8_linear import uses_float8
from ..model.llama import Llama

# Of the activations, what "cheap" leaves to torch's partitioner to keep. It then keeps what
# products and attention made and recomputes the rest; lower shares recompute products too.
CHEAP = 0.7
COSTLY = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten._scaled_mm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.llama_torch.attend_in_documents.default,
}


def compile_blocks(model: Llama, mode: str, recompute: str) -> bool:
    """Compile and set up recomputation in a model's blocks, in place; return whether compiled.

    ``mode`` and ``recompute`` are TrainConfig's ``compile`` and ``recompute``. One block is
    compiled for all of them: their parameters are its inputs. Raises InputError where ``mode`` is
    "yes" and torch.compile does not work.
    """
    device = model.model.embed_tokens.weight.device
    wanted = mode == "yes" or (mode == "auto" and device.type == "cuda")
    works = wanted and can_compile(device)
    if mode == "yes" and not works:
        raise InputError("--compile yes: torch.compile does not work here; leave it out")
    if recompute == "auto":
        # To compute products in fp8 again takes more of the time that they save than it is worth.
        recompute = "cheap" if works and not uses_float8(model) else "none"
    if works:
        functorch = torch._functorch.config
        functorch.activation_memory_budget = CHEAP if recompute == "cheap" else 1.0
        if hasattr(functorch, "unsafe_treat_script_objects_as_zero_size"):  # torch 2.13
            # The process groups of --tp are inputs of a block's graph. They hold no tensors, and
            # the budget's arithmetic refuses to guess so.
            functorch.unsafe_treat_script_objects_as_zero_size = True
        for layer in model.model.layers:
            # The forward method, not the module: the hooks of FSDP2 around it are not to be traced.
            layer.forward = torch.compile(layer.forward, fullgraph=True, dynamic=False)
    if recompute == "all":
        model.model.recompute = {}
    elif recompute == "cheap" and not works:
        contexts = partial(create_selective_checkpoint_contexts, _keep_costly)
        model.model.recompute = {"context_fn": contexts}
    return works


def _keep_costly(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    keep = operation in COSTLY
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


def uncompiled() -> AbstractContextManager[object]:
    """Run without compilation, for rare calls with shapes of their own."""
    context: AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
    return context
