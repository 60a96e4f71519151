"""Write small valid folders of every kind that is read, for mutations to begin from."""

import contextlib
import gzip
import json
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from llama_common.files import write_json
from llama_parity.comparison.trace_file import TraceWriter, write_trace
from llama_parity.comparison.trace_format import Call, Step
from llama_parity.conversion.gguf_model import write_gguf
from llama_parity.conversion.hf_checkpoint import read_hf
from llama_torch.checkpoint.directory_files import write_directory_files
from llama_torch.checkpoint.hf import save_model
from llama_torch.checkpoint.shards import StateShards
from llama_torch.checkpoint.single_file import SingleFile
from llama_torch.checkpoint.state_interface import TrainingState
from llama_torch.config import TrainConfig
from llama_torch.data.shard_writer import prepare
from llama_torch.data.text_files import Text, identify
from llama_torch.model.config import ModelConfig
from llama_torch.training import run_dir
from llama_torch.training.origin import Origin
from reference_np.config import LlamaConfig
from reference_np.grad import Batch
from reference_np.naming import activation_axes, parameter_shapes
from reference_np.optim import Hyperparameters

from ..support.meta_checkpoints import a_meta
from ..support.token_shards import LINES, stopped_at
from ..support.tokenizers import HEADED, pieces_model, write_json_tokenizer

CONFIG = LlamaConfig(8, 1, 2, 1, 4, 8, 16, max_seq_len=16, tie_embeddings=False)
MODEL = ModelConfig(8, 1, 2, 1, 4, 8, 16, max_seq_len=16, tie_embeddings=False)
SHARD_TOKENS = 400
TEXTS = [" llamas walk", "Über den Hügel.\n\n  Two", "", "The end"]
TOKENIZER_SETTINGS = {
    "tokenizer_class": "LlamaTokenizerFast",
    "bos_token": "<s>",
    "eos_token": {"content": "</s>", "lstrip": False, "normalized": False},
    "add_bos_token": True,
    "clean_up_tokenization_spaces": False,
    "added_tokens_decoder": {"0": {"content": "<s>", "special": True}},
    "model_max_length": 1000,
    "chat_template": HEADED,
}


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    """Return random weights of the model, float32, by Hugging Face name."""
    generator = torch.Generator().manual_seed(seed)
    shapes = parameter_shapes(CONFIG).items()
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes}


def model(folder: Path) -> None:
    """Write a model directory of one file, whose metadata holds the config."""
    write_directory_files(folder, MODEL)
    save_model(folder, MODEL, tensors())


def indexed(folder: Path) -> None:
    """Write a model directory of two files with an index; beside it stands a file of others'."""
    names = list(tensors())
    files = {f"model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    for file, group in files.items():
        save_file({name: tensors()[name] for name in group}, folder / file)
    weight_map = {name: file for file, group in files.items() for name in group}
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope["original_max_position_embeddings"] = 8
    write_json(folder / "config.json", CONFIG.to_hf() | {"rope_scaling": rope, "eos_token_id": 1})


def trace(folder: Path) -> None:
    """Write a trace of a prompt, of one token after it, and of a training step."""
    tokens = np.array([[1, 2, 3]])
    mask = np.tril(np.ones((1, 3, 3), bool))
    steps = [Step([Batch(tokens, tokens + 1), Batch(tokens, tokens - 1, tokens, mask)])]
    last = Call("more", tokens[:, :1], np.array([[3]]), np.ones((1, 1, 4), bool), 0)
    calls = [Call("prompt", tokens, targets=tokens + 1), last]

    def fill(writer: TraceWriter) -> None:
        for c, call in enumerate(calls):
            sizes = {"B": 1, "T": call.tokens.shape[1], "D": 8, "H": 2, "N": 1, "K": 4, "F": 8}
            for name, axes in activation_axes(CONFIG).items():
                shape = [(sizes | {"V": 16})[axis] for axis in axes]
                writer.add(c, name, np.full(shape, 0.5, np.float32))
        writer.add(0, "target_logprobs", np.full(tokens.shape, -1.5, np.float32))
        writer.add_step(0, "loss", np.array(0.5))
        for kind in ("grad", "param", "exp_avg", "exp_avg_sq"):
            writer.add_step(0, f"{kind}.model.norm.weight", np.ones(8))

    path, hyper = folder / "trace.safetensors", Hyperparameters()
    write_trace(path, CONFIG, calls, "float32", fill, steps=steps, hyperparameters=hyper)


def toml(folder: Path) -> None:
    """Write a file of the trainer's settings."""
    lines = ["[data]", 'data = ["a.txt"]', "weights = [1.0]", "[model]", "dim = 64", "n_layers = 2"]
    lines += ["[optim]", "lr = 1e-3", "seed = 7", 'dtype = "float32"', "pack_documents = true"]
    (folder / "settings.toml").write_text("\n".join(lines) + "\n")


def run(folder: Path) -> None:
    """Write a run directory: its record, a checkpoint and the best model."""
    config = TrainConfig(out=str(folder / "run"), model=MODEL)
    (folder / "run").mkdir()
    run_dir.claim(config, "0" * 32, Origin(MODEL))
    state = TrainingState(_state_tensors(), 7, [3])
    checkpoint = folder / "run" / "checkpoints" / "7"
    checkpoint.mkdir(parents=True)
    SingleFile(checkpoint).write(state)
    best = folder / "run" / "best"
    best.mkdir()
    write_directory_files(best, MODEL)
    save_model(best, MODEL, tensors(), {"step": "7", "val_loss": "2.5"})


def shards(folder: Path) -> None:
    """Write a checkpoint in shards of torch.distributed.checkpoint."""
    written = StateShards(folder)
    with warnings.catch_warnings(action="ignore"):  # torch tells that there is no job
        written.write(_state_tensors(), alone=True)
    written.write_metadata(7, [3])


def _state_tensors() -> dict[str, torch.Tensor]:
    kinds = ("parameter", "exp_avg", "exp_avg_sq")
    return {f"{k}.{n}": x.square() for k in kinds for n, x in tensors().items()}


def text_of(folder: Path) -> Text:
    """Return the text whose tokens ``token_shards`` and ``half_prepared`` write."""
    return identify([folder / "text.txt"], "text")


def token_shards(folder: Path) -> None:
    """Write a text and all of its token shards."""
    (folder / "text.txt").write_text("".join(LINES))
    prepare(text_of(folder), folder / "tokens", 1, SHARD_TOKENS)


def half_prepared(folder: Path) -> None:
    """Write a text and its first token shards, as a full disk leaves them."""
    (folder / "text.txt").write_text("".join(LINES))
    stopped_at("00002", text_of(folder), folder / "tokens", SHARD_TOKENS)


def texts(folder: Path) -> None:
    """Write a text in each format that the packages here write."""
    lines = "\n".join(json.dumps({"text": text, "id": i}) for i, text in enumerate(TEXTS))
    (folder / "a.txt").write_text("".join(TEXTS) * 3)
    (folder / "a.jsonl").write_text(lines)
    (folder / "a.txt.gz").write_bytes(gzip.compress("".join(TEXTS).encode() * 3, mtime=0))
    with contextlib.suppress(ImportError):
        (folder / "a.jsonl.zst").write_bytes(_zstd().compress(lines.encode()))
    with contextlib.suppress(ImportError):
        import pyarrow.parquet

        table = pyarrow.table({"text": [*TEXTS, None], "id": range(5)})
        pyarrow.parquet.write_table(table, folder / "a.parquet")


def _zstd() -> Any:
    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        from backports import zstd
    return zstd


def tokenizer(folder: Path) -> None:
    """Write a tokenizer.json of bytes with the files beside it."""
    write_json_tokenizer(folder, ["the", "<|x|>"])
    _write_beside(folder)


def pieces(folder: Path) -> None:
    """Write SentencePiece's tokenizer.model with the files beside it."""
    (folder / "tokenizer.model").write_bytes(pieces_model())
    _write_beside(folder)


def _write_beside(folder: Path) -> None:
    settings = dict(TOKENIZER_SETTINGS)
    (folder / "chat_template.jinja").write_text(str(settings["chat_template"]))
    write_json(folder / "tokenizer_config.json", settings)
    names = {"bos_token": "<s>", "eos_token": {"content": "</s>", "special": True}}
    write_json(folder / "special_tokens_map.json", names | {"additional_special_tokens": ["<|x|>"]})
    generation = {"eos_token_id": [1], "bos_token_id": 0, "temperature": 0.6, "num_beams": 1}
    write_json(folder / "generation_config.json", generation)
    write_json(folder / "config.json", {"eos_token_id": 1})
    turns = [("system", "Be brief."), ("user", "Hi <s> there"), ("assistant", "Yes?")]
    messages = [{"role": role, "content": content} for role, content in turns]
    write_json(folder / "messages.json", {"messages": messages})


def meta(folder: Path) -> None:
    """Write a checkpoint in Meta's form."""
    a_meta(folder / "meta", 1)


def gguf(folder: Path) -> None:
    """Write a GGUF file of a Llama with scaled frequencies and a vocabulary of pieces."""
    (folder / "a").mkdir()
    indexed(folder / "a")
    tokens = [f"[PAD{i}]" for i in range(CONFIG.vocab_size)]
    vocabulary = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", "▁the", *tokens[4:]],
        "tokenizer.ggml.scores": [-float(i) for i in range(len(tokens))],
        "tokenizer.ggml.token_type": [2, 3, 3, 1] + [5] * (len(tokens) - 4),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.chat_template": HEADED,
    }
    write_gguf(folder / "model.gguf", read_hf(folder / "a"), None, vocabulary)
    shutil.rmtree(folder / "a")


def conversations(folder: Path) -> None:
    """Write conversations of every form."""
    said = [("system", "Be brief."), ("user", "Sort 3 1"), ("assistant", "1 3")]
    messages = [{"role": role, "content": text} for role, text in said]
    shared = [{"from": "human", "value": "Sort"}, {"from": "gpt", "value": "what?"}]
    records: list[dict[str, Any]] = [
        *({"messages": messages, "id": 1}, {"conversations": shared, "system": "Ask."}),
        {"prompt": "Sort 3 1", "completion": "1 3"},
    ]
    (folder / "a.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    with contextlib.suppress(ImportError):
        import pyarrow.parquet

        table = pyarrow.Table.from_pylist([{"messages": messages}] * 3)
        pyarrow.parquet.write_table(table, folder / "a.parquet")


def pairs(folder: Path) -> None:
    """Write pairs of answers of every form."""
    asked = [{"role": "user", "content": "Sort 3 1"}]
    answers = {"chosen": "1 3", "rejected": "3 1"}
    listed = {key: [*asked, {"role": "assistant", "content": a}] for key, a in answers.items()}
    said = {key: f"\n\nHuman: Sort 3 1\n\nAssistant: {a}" for key, a in answers.items()}
    records: list[dict[str, Any]] = [
        {"prompt": "Sort 3 1", **answers, "strength": "better", "safety": True},
        *({"prompt": asked, **answers, "chosen_safe": True}, listed, said),
    ]
    (folder / "a.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))


def instructions(folder: Path) -> None:
    """Write instructions in both forms, and conversations whose questions are to be asked."""
    (folder / "a.txt").write_text("Speak as a cat.\n\nRhyme. 漢字\n", encoding="utf-8")
    conversations(folder)
    (folder / "a.jsonl").rename(folder / "prompts.jsonl")
    records = {"instruction": "Speak as a cat.", "short": "Figure: cat."}, {"instruction": "Rhyme."}
    (folder / "a.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))


def prompts(folder: Path) -> None:
    """Write prompts of every form, and what a round of rejection sampling drew to one."""
    asked = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Sort 3 1"}]
    records: list[dict[str, Any]] = [
        *({"prompt": "Sort 3 1", "safety": True}, {"prompt": asked}, {"messages": asked, "id": 1}),
    ]
    (folder / "a.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    scores = {"reward": 0.5, "helpful": 0.5, "safe": None}
    drawn = [{"answer": "1 3", "ended": True, "ids": [352, 513, 2], **scores}] * 2
    line = {"messages": asked, "safety": False, "samples": drawn}
    (folder / "samples.jsonl").write_text((json.dumps(line) + "\n") * 2)


BUILD: dict[str, Callable[[Path], None]] = {
    maker.__name__: maker
    for maker in (
        *(model, indexed, trace, toml, run, shards, token_shards, half_prepared, texts),
        *(conversations, instructions, pairs, prompts, tokenizer, pieces, meta, gguf),
    )
}
