"""Sampling with the cache: ``python -m llama_torch.generate --ckpt DIR --prompt TEXT``."""

import codecs
import io
import sys
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import tiktoken
import torch
import torch.nn.functional as F
from torch import Tensor

from . import cli
from .checkpoint import load_model
from .config import GenerateConfig, InputError
from .device import pick_device
from .model import Llama
from .tokenizer import encoding_for


def token_probabilities(logits_V: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """Return the distribution [V] to draw from, in float64; ``temperature`` is above 0.

    Order: temperature, then top-k, then top-p on what is left. top-p keeps the smallest set of
    likeliest tokens that holds at least ``top_p`` (Holtzman et al. 2020), never none.
    """
    # float64: in float32 the running sum of 50,257 probabilities reaches 1 before its end.
    ordered, order = torch.sort(logits_V.double(), descending=True, stable=True)
    ordered = (ordered - ordered[0]) / temperature  # the largest stays 0 at any temperature
    if top_k:
        ordered[top_k:] = -torch.inf
    probs = ordered.softmax(-1)
    if top_p < 1:
        before = probs.cumsum(-1) - probs  # mass of the likelier tokens
        probs[before >= top_p] = 0
    return torch.zeros_like(probs).scatter_(0, order, probs / probs.sum())


@torch.inference_mode()
def generate(
    model: Llama,
    prompt: Sequence[int],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
    stop: Collection[int] = (),
) -> Iterator[int]:
    """Yield token ids after ``prompt`` until a stop token (not yielded) or a limit is reached.

    The limits are ``max_new_tokens`` and the model's context. Raises InputError for an empty
    prompt, one that fills the context, and ids outside the vocabulary.
    """
    config = model.config
    if not 0 < len(prompt) < config.max_seq_len:
        raise InputError(
            f"--prompt is {len(prompt)} tokens long and the context holds {config.max_seq_len}; "
            "give between 1 and one fewer than that"
        )
    for token in prompt:
        if not 0 <= token < config.vocab_size:
            raise InputError(f"token id {token} is outside the vocabulary of {config.vocab_size}")
    device = model.head_weight.device
    tokens, cache = torch.tensor([list(prompt)], device=device), None
    for _ in range(min(max_new_tokens, config.max_seq_len - len(prompt))):
        hidden, cache = model.model(tokens, cache=cache)
        logits = F.linear(hidden[0, -1], model.head_weight)  # only the last position is needed
        if not logits.isfinite().all():
            raise InputError("the model's logits are not finite; check its weights with compare.py")
        if temperature == 0:
            token = int(logits.argmax())
        else:
            probs = token_probabilities(logits, temperature, top_k, top_p)
            # On the CPU, so that the draw itself does not depend on the device.
            token = int(torch.multinomial(probs.cpu(), 1, generator=generator))
        if token in stop:
            return
        yield token
        tokens = torch.tensor([[token]], device=device)


def stream_text(tokens: Iterator[int], encoding: tiktoken.Encoding) -> Iterator[str]:
    """Yield text as it becomes complete: a character is never split between two pieces."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for token in tokens:
        # Ids above the encoding's (a padded vocabulary) stand for nothing.
        raw = encoding.decode_single_token_bytes(token) if token < encoding.n_vocab else b""
        if piece := decoder.decode(raw):
            yield piece
    if rest := decoder.decode(b"", final=True):
        yield rest


def stop_ids(names: Sequence[str], encoding: tiktoken.Encoding) -> set[int]:
    """Return the ids of ``--stop``; InputError for a text that is not one token."""
    ids = set()
    for name in names:
        encoded = encoding.encode(name, allowed_special="all")
        if len(encoded) != 1:
            raise InputError(f"--stop {name!r} is {len(encoded)} tokens; give texts of one token")
        ids.add(encoded[0])
    return ids


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    return cli.run(lambda: _main(sys.argv[1:] if argv is None else argv))


def _main(argv: Sequence[str]) -> int:
    config = cli.parse(GenerateConfig, argv)
    device = pick_device(config.device)
    model = load_model(config.ckpt, dtype=getattr(torch, config.dtype), device=device)
    encoding = encoding_for(Path(config.ckpt), model.config.vocab_size)
    stop = stop_ids(config.stop, encoding)
    tokens = generate(
        model,
        encoding.encode_ordinary(config.prompt),
        config.max_new_tokens,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        generator=torch.Generator().manual_seed(config.seed),
        stop=stop,
    )
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character
    first = next(tokens, None)  # so that a refused prompt prints nothing else
    print(config.prompt, end="", flush=True)
    if first is not None:
        for piece in stream_text(_chain(first, tokens), encoding):
            print(piece, end="", flush=True)
    print()
    return 0


def _chain(first: int, rest: Iterator[int]) -> Iterator[int]:
    yield first
    yield from rest


if __name__ == "__main__":
    sys.exit(main())
