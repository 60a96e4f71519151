"""Write small model directories of any tokenizer, dtype and number of files; train from them."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from llama_common.files import write_json
from llama_torch.model.config import ModelConfig
from llama_torch.model.llama import Llama
from llama_torch.tokenizer.encoding import load_encoding
from llama_torch.tokenizer.loading import load_tokenizer

from . import tokenizers
from .trainer_runs import TEXT

# Of four different shapes; a vocabulary above each tokenizer's.
CONFIGS = {
    "gpt2": ModelConfig(16, 2, 4, 2, 4, 24, 50257, 64, 1e-5, 10000.0, True),
    "bytes": ModelConfig(
        *(16, 1, 2, 1, 8, 24, 520, 128, 1e-6, 500000.0, True, "llama3", 8.0, 1.0, 4.0, 32)
    ),
    "spaced": ModelConfig(12, 2, 3, 3, 4, 16, 700, 40, 1e-4, 9000.0, False, "linear", 2.0),
    "pieces": ModelConfig(16, 2, 4, 4, 4, 32, 400, 48, 1e-5, 10000.0, False),
}
GENERATION = {"temperature": 0.5, "max_new_tokens": 7}

WINDOW = 16
RUN = [
    *("--max-seq-len", str(WINDOW), "--batch-size", "2", "--steps", "4", "--warmup-steps", "2"),
    *("--log-every", "1", "--eval-every", "2", "--eval-batches", "0", "--sample-every", "2"),
    *("--save-every", "2", "--device", "cpu", "--dtype", "float32", "--lr", "1e-3"),
]
KINDS = {  # tokenizer, dtype of the weights, number of their files
    "gpt2": (torch.float32, 1),
    "bytes": (torch.bfloat16, 3),
    "spaced": (torch.float64, 2),
    "pieces": (torch.float16, 1),
}


def write_model(
    folder: Path, kind: str, dtype: torch.dtype = torch.float32, n_files: int = 1
) -> ModelConfig:
    """Write a random model with a tokenizer of that kind, in ``n_files`` files; return its config.

    Matrices are drawn wider than a trainer's, so that losses differ from ln(vocabulary).
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = CONFIGS[kind]
    model = Llama(config)
    generator = torch.Generator().manual_seed(7)
    model.init_weights(generator)
    tensors = {name: (5 * p).detach().to(dtype) for name, p in model.named_parameters()}
    names = [f"model-{i}.safetensors" for i in range(n_files)]
    weight_map = {name: names[i % n_files] for i, name in enumerate(tensors)}
    if n_files == 1:
        weight_map = dict.fromkeys(tensors, "model.safetensors")
    else:
        index = folder / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": weight_map}))
    for file in {*weight_map.values()}:
        kept = {n: t.contiguous() for n, t in tensors.items() if weight_map[n] == file}
        save_file(kept, folder / file, {"format": "pt"})
    tokenizers.KINDS[kind](folder)
    ids = {"bos_token_id": 3, "eos_token_id": [1, 2], "pad_token_id": 4}
    write_json(folder / "config.json", config.to_hf() | ids)
    write_json(folder / "generation_config.json", GENERATION)
    return config


def without_ends(folder: Path) -> Path:
    """Write a random model that names no end token; return its folder."""
    write_model(folder, "bytes")
    config = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", config | {"eos_token_id": None})
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token": None}))
    return folder


def document_of(model: Path, kind: str) -> str:
    """Return a text whose ids fill whole windows."""
    tokenizer = load_tokenizer(model, CONFIGS[kind].vocab_size)
    lengths = (n for n in range(700, 0, -1) if len(tokenizer.encode(TEXT[:n])) % WINDOW == 0)
    return TEXT[: next(lengths)]


def flags_of(model: Path, kind: str, folder: Path) -> tuple[list[str], str]:
    """Return a run's flags and a document; what is held out are BOS, the document and EOS."""
    document = document_of(model, kind)
    path = folder / f"{kind}.jsonl"
    path.write_text((json.dumps({"text": document}) + "\n") * 2)
    encoding = load_encoding(model, CONFIGS[kind].vocab_size)
    n_ids = len(encoding.document_ids(document))
    n_held_out = len(encoding.tokenizer.encode(document)) + 2
    fraction = (n_held_out + 0.5) / (2 * n_ids)
    data = ["--data", str(path), "--val-fraction", repr(fraction)]
    return [*RUN, *data, "--cache-dir", str(folder / "cache"), "--init-from", str(model)], document
