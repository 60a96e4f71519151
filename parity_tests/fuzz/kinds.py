"""The kinds of files that are read: which file is mutated, how, and by which reader it is read."""

import contextlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from llama_common.cli import parse
from llama_common.errors import InputError
from llama_common.settings import read_toml
from llama_parity.comparison.trace_file import TraceFile
from llama_parity.conversion.gguf_checkpoint import GgufCheckpoint
from llama_parity.conversion.gguf_vocabulary import token_ids_of, tokenizer_files
from llama_parity.conversion.meta_checkpoint import read_meta
from llama_torch.checkpoint.hf import load_model, read_metadata
from llama_torch.checkpoint.training_state import load_state
from llama_torch.common.state_file import CHECKSUM, with_checksum
from llama_torch.config import TrainConfig
from llama_torch.data.conversations import read_conversations
from llama_torch.data.documents import encode
from llama_torch.data.documents import pieces as pieces_of
from llama_torch.data.preferences import read_pairs
from llama_torch.data.shard_check import damaged_shards
from llama_torch.data.shard_writer import prepare
from llama_torch.data.shards import TokenShards
from llama_torch.data.text_files import find_files, identify
from llama_torch.inference.generation_file import end_ids
from llama_torch.rlhf.ghost_attention import read_questions
from llama_torch.rlhf.instructions import read_instructions
from llama_torch.rlhf.prompts import read_prompts
from llama_torch.rlhf.rejection_folder import read_samples
from llama_torch.tokenizer.chat_template import load_chat_template
from llama_torch.tokenizer.loading import load_tokenizer
from llama_torch.training.file_saver import read_best_loss
from llama_torch.training.run_file import check_resume_config, read_run
from reference_np.checkpoint import Checkpoint

from . import folders, mutations
from .mutations import Mutate
from .outcomes import Outcome, outcome

VOCAB = 999  # of the model that a tokenizer is read for
SAYING = [{"role": "user", "content": "Hi <s> there, 漢字  two"}]


class Kind(NamedTuple):
    """A kind of file, in a folder of valid ones, and its reader."""

    folder: str  # a builder's name in folders.BUILD
    file: str  # the one that is mutated
    mutate: Mutate
    read: Callable[[Path], Any]
    package: str = "llama_torch"
    writes: bool = False
    names_flags: bool = False
    memory: int = 8  # bytes for each byte of the files, beside a constant

    @property
    def name(self) -> str:
        """The kind's name in test ids."""
        return f"{self.folder}/{Path(self.file).name}"

    def outcome(self, folder: Path) -> Outcome:
        """Read the kind's file in ``folder``; raise AssertionError where the reader fails."""
        return outcome(self.read, folder, self.package, self.writes, self.names_flags, self.memory)


def _mutated_state(random: Random, content: bytes) -> bytes:
    """Return a state file mutated, half of the time with the checksum of its new content."""
    changed = mutations.mutated_json(random, content)
    if random.randrange(2):
        with contextlib.suppress(ValueError, RecursionError):
            found = json.loads(changed)
            if isinstance(found, dict):
                found.pop(CHECKSUM, None)
                return json.dumps(with_checksum(found)).encode()
    return changed


def torch_model(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the config and the weights, float32 arrays, that llama_torch reads."""
    model = load_model(folder)
    weights = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    return asdict(model.config), weights


def oracle_model(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the config and the weights, float32 arrays, that reference_np reads."""
    checkpoint = Checkpoint(folder)
    return asdict(checkpoint.config), dict(checkpoint)


def _trace(folder: Path) -> Any:
    trace = TraceFile(folder / "trace.safetensors")
    names = [*folders.activation_axes(folders.CONFIG), "target_logprobs"]
    read = [trace.read(c, n) for c in range(len(trace.calls)) for n in names]
    for s in range(len(trace.steps)):
        read += [trace.read_step(s, n) for n in ("loss", "param.model.norm.weight")]
    return trace.config, read, trace.hyperparameters


def _settings(folder: Path) -> TrainConfig:
    return parse(TrainConfig, [], read_toml(str(folder / "settings.toml"), TrainConfig))


def _run(folder: Path) -> TrainConfig:
    record = read_run(folder / "run")
    config = parse(TrainConfig, ["--out", str(folder / "run")], record.settings)
    check_resume_config(config, "0" * 32)
    return config


def _checkpoint(folder: Path) -> Any:
    return load_state(folder / "run" / "checkpoints" / "7")


def _best(folder: Path) -> Any:
    best = folder / "run" / "best"
    read_metadata(best / "model.safetensors")
    return read_best_loss(folder / "run"), load_model(best)


def _token_shards(folder: Path) -> Any:
    shards = TokenShards(folder / "tokens")
    return shards[0 : len(shards)].sum(), damaged_shards(shards)


def _prepared(folder: Path) -> Any:
    shards = prepare(folders.text_of(folder), folder / "tokens", 1, folders.SHARD_TOKENS)
    return list(shards[0 : len(shards)])


def _text(name: str) -> Callable[[Path], Any]:
    def read(folder: Path) -> Any:
        text = identify(find_files([str(folder / name)]), "text")
        return [encode(piece, "text") for piece in pieces_of(text.files, "text")]

    return read


def _talk(name: str) -> Callable[[Path], Any]:
    return lambda folder: list(read_conversations([str(folder / name)]))


def _questions(folder: Path) -> Any:
    return read_questions([str(folder / "prompts.jsonl")])


def _instructions(name: str) -> Callable[[Path], Any]:
    return lambda folder: read_instructions(str(folder / name))


def _prompts(folder: Path) -> Any:
    return list(read_prompts([str(folder / "a.jsonl")]))


def _pairs(folder: Path) -> Any:
    return list(read_pairs([str(folder / "a.jsonl")]))


def _tokenizer(folder: Path) -> Any:
    found = load_tokenizer(folder, VOCAB)
    end_ids(folder, found, VOCAB)
    ids = found.encode(" The llama <s> walks  over\n<|x|> 漢字")
    return found, ids, found.decode(range(VOCAB))


def _chat(folder: Path) -> Any:
    return load_chat_template(folder, load_tokenizer(folder, VOCAB)).encode(SAYING)


def _messages(folder: Path) -> Any:
    path = folder / "messages.json"
    template = load_chat_template(folder, load_tokenizer(folder, VOCAB))
    try:
        messages = json.loads(path.read_bytes())["messages"]
    except (ValueError, RecursionError, KeyError, TypeError):
        messages = None
    if not isinstance(messages, list):
        raise InputError(f"{path}: holds no messages")  # the caller's part, not the reader's
    try:
        return template.encode(messages)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _meta(folder: Path) -> Any:
    model = read_meta(folder / "meta", 64, 0)
    return {name: weight.read() for name, weight in model.weights.items()}


def _gguf(folder: Path) -> Any:
    checkpoint = GgufCheckpoint(folder / "model.gguf")
    size = checkpoint.config.vocab_size
    ids = token_ids_of(checkpoint.file, size)
    return dict(checkpoint), ids, tokenizer_files(checkpoint.file, size, 16)


# Read by two packages, which must agree.
MODELS = (
    Kind("model", "config.json", mutations.mutated_json, torch_model),
    Kind("model", "model.safetensors", mutations.mutated_safetensors, torch_model),
    Kind("indexed", "config.json", mutations.mutated_json, torch_model),
    Kind("indexed", "model-00001-of-00002.safetensors", mutations.mutated_safetensors, torch_model),
    Kind("indexed", "model.safetensors.index.json", mutations.mutated_json, torch_model),
)
STATE = "run/checkpoints/7/training_state.safetensors"
SIDE_FILES = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json")
KINDS = (
    *MODELS,
    Kind("trace", "trace.safetensors", mutations.mutated_safetensors, _trace, "tools"),
    Kind("toml", "settings.toml", mutations.mutated_toml, _settings, names_flags=True),
    Kind("run", "run/run.json", _mutated_state, _run, names_flags=True),
    Kind("run", STATE, mutations.mutated_safetensors, _checkpoint),
    Kind("run", "run/best/model.safetensors", mutations.mutated_safetensors, _best),
    Kind("shards", ".metadata", mutations.mutated_bytes, load_state),
    Kind("shards", "__0_0.distcp", mutations.mutated_bytes, load_state),
    Kind("shards", "state.json", _mutated_state, load_state),
    Kind("token_shards", "tokens/index.json", _mutated_state, _token_shards),
    Kind("token_shards", "tokens/00000.bin", mutations.mutated_bytes, _token_shards),
    Kind("half_prepared", "tokens/progress.json", _mutated_state, _prepared, writes=True),
    Kind("texts", "a.txt", mutations.mutated_text, _text("a.txt")),
    Kind("texts", "a.jsonl", mutations.mutated_lines, _text("a.jsonl")),
    Kind("texts", "a.txt.gz", mutations.mutated_bytes, _text("a.txt.gz")),
    Kind("texts", "a.jsonl.zst", mutations.mutated_bytes, _text("a.jsonl.zst")),
    Kind("texts", "a.parquet", mutations.mutated_bytes, _text("a.parquet")),
    # An object of a line takes more than its text, and all conversations are in memory.
    Kind("conversations", "a.jsonl", mutations.mutated_lines, _talk("a.jsonl"), memory=64),
    Kind("conversations", "a.parquet", mutations.mutated_bytes, _talk("a.parquet"), memory=64),
    Kind("instructions", "prompts.jsonl", mutations.mutated_lines, _questions, memory=64),
    Kind("instructions", "a.jsonl", mutations.mutated_lines, _instructions("a.jsonl"), memory=64),
    Kind("instructions", "a.txt", mutations.mutated_text, _instructions("a.txt"), memory=64),
    Kind("pairs", "a.jsonl", mutations.mutated_lines, _pairs, memory=64),
    Kind("prompts", "a.jsonl", mutations.mutated_lines, _prompts, memory=64),
    Kind("prompts", "samples.jsonl", mutations.mutated_lines, read_samples, memory=64),
    Kind("tokenizer", "tokenizer.json", mutations.mutated_json, _tokenizer),
    *(Kind("tokenizer", name, mutations.mutated_json, _tokenizer) for name in SIDE_FILES),
    Kind("pieces", "tokenizer.model", mutations.mutated_bytes, _tokenizer),
    *(Kind("pieces", name, mutations.mutated_json, _tokenizer) for name in SIDE_FILES[:2]),
    Kind("tokenizer", "chat_template.jinja", mutations.mutated_text, _chat),
    # The tokenizers library takes some 400 bytes for a token.
    Kind("tokenizer", "messages.json", mutations.mutated_json, _messages, memory=512),
    Kind("gguf", "model.gguf", mutations.mutated_bytes, _gguf, "tools"),
    Kind("meta", "meta/params.json", mutations.mutated_json, _meta),
    Kind("meta", "meta/consolidated.00.pth", mutations.mutated_bytes, _meta),
)
