"""Read and write Hugging Face model directories: config.json and safetensors.

Every file is written under a temporary name and renamed, so that a kill leaves the old file or
the new one.
"""

import json
import math
from collections.abc import Collection, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from llama_common.errors import InputError
from llama_common.files import atomic_write, parse_json, read_json

from ..model.config import REWARD_KEYS, ModelConfig
from ..model.llama import Llama
from ..model.reward import RewardModel
from ..model.shapes import EMBEDDING, HEAD, SCORE, ParameterShapes
from .file_names import MODEL_FILE
from .weight_files import open_safetensors, weight_files

# A buffer that old Hugging Face checkpoints stored although the config determines it.
DERIVED_SUFFIX = ".rotary_emb.inv_freq"

# What a parameter may be stored as, by safetensors' names.
DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}

COMPILED = "_orig_mod."  # how torch.compile's wrapper names its model

FEW = 3  # tensors that a message names, of each kind of problem


class Stored(NamedTuple):
    """Where a parameter is stored, and as what."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype


def save_model(
    directory: Path,
    config: ModelConfig,
    parameters: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write model.safetensors from parameters by Hugging Face name.

    Its metadata holds the config, so that the file is readable without config.json, and
    ``metadata``. Raises InputError where the disk refuses the file.
    """
    hf = {**config.to_hf(), **(REWARD_KEYS if SCORE in parameters else {})}
    own = {"format": "pt", "config": json.dumps(hf)}
    save_tensors(directory / MODEL_FILE, parameters, {**own, **(metadata or {})})


def read_metadata(path: Path) -> dict[str, str]:
    """Return a safetensors file's metadata; raise InputError for a file that cannot be read."""
    with open_safetensors(path) as file:
        return file.metadata() or {}


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file atomically; raise InputError where the disk refuses it."""
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        atomic_write(path, lambda temporary: save_file(on_cpu, temporary, metadata))
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{path}: cannot be written ({error}); the last checkpoint stands"
        ) from None


def load_model(
    path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> Llama:
    """Load a Llama from a model directory (one file or shards) or from one .safetensors file.

    Returns it in evaluation mode, with weights of ``dtype`` on ``device``; float32 weights on the
    CPU are mapped from the file. Raises InputError for files that cannot be read, a config that
    contradicts them or is unsupported, and tensors that are missing, extra or misshapen (all named
    at once), and for a reward model.
    """
    return _load(Path(path), Llama, dtype, device)


def require_finite(model: Llama, name: str) -> None:
    """Raise InputError, whose first words are ``name``, where a weight is not finite."""
    for parameter_name, parameter in model.named_parameters():
        if not all(map(math.isfinite, torch.stack(torch.aminmax(parameter.detach())).tolist())):
            raise InputError(
                f"{name}: {parameter_name} is not finite in {parameter.dtype}; give another model, "
                "or load it in another precision"
            )


def load_reward_model(
    path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> RewardModel:
    """Load a reward model as ``load_model`` loads a language model, which raises InputError."""
    return _load(Path(path), RewardModel, dtype, device)


Kind = TypeVar("Kind", bound=Llama)


def _load(path: Path, kind: type[Kind], dtype: torch.dtype, device: str | torch.device) -> Kind:
    config, files = locate(path)
    found = {name: where.shape for name, where in files.items()}
    is_reward = kind is RewardModel
    require_kind(path, found, is_reward)
    # Before a model of that many layers is made.
    require_match(path, ParameterShapes(config, is_reward), found)
    with torch.device("meta"):
        model = kind(config)
    tensors = {name: read_tensor(files[name].file, name, dtype, device) for name in files}
    model.load_state_dict(tensors, assign=True)
    return model.eval()


def require_kind(path: Path, names: Collection[str], is_reward: bool = False) -> None:
    """Raise InputError for a reward model where a language model is wanted, and the reverse."""
    if SCORE in names and not is_reward:
        raise InputError(
            f"{path}: is a reward model, which scores answers and writes none ({SCORE} is its "
            "head); give a language model's directory"
        )
    if SCORE not in names and is_reward:
        raise InputError(
            f"{path}: is no reward model, which has a head {SCORE}; give the directory of one, "
            "as python -m llama_torch.reward trains it"
        )


def locate(path: Path) -> tuple[ModelConfig, dict[str, Stored]]:
    """Read a checkpoint's config, and every parameter's file, shape and dtype, without its data.

    Raises InputError as ``load_model`` does.
    """
    files = weight_files(path)
    found: dict[str, Stored] = {}
    for file_path in files:
        with open_safetensors(file_path) as file:
            for name in file.keys():  # noqa: SIM118
                if name.endswith(DERIVED_SUFFIX):
                    continue
                part = file.get_slice(name)
                if (kind := part.get_dtype()) not in DTYPES:
                    raise InputError(f"{file_path}: {name} is stored as {kind}; save it in float")
                if name in found:
                    raise InputError(f"{file_path}: {name} is also in another shard; keep one")
                found[name] = Stored(file_path, tuple(part.get_shape()), DTYPES[kind])
    config = read_config(path, files)
    if config.tie_embeddings and {EMBEDDING, HEAD} <= found.keys():
        _require_equal(found[EMBEDDING].file, found.pop(HEAD).file)
    elif config.tie_embeddings and HEAD in found:
        found[EMBEDDING] = found.pop(HEAD)  # of two names for one tensor this one was kept
    return config, found


def _require_equal(embedding: Path, head: Path) -> None:
    """Raise InputError where a stored head differs from the embedding that it is tied to."""
    with open_safetensors(embedding) as first, open_safetensors(head) as second:
        if not torch.equal(first.get_tensor(EMBEDDING), second.get_tensor(HEAD)):
            raise InputError(
                f"{head}: {HEAD} is not the embedding although tie_word_embeddings is true; "
                "remove it, or set that to false"
            )


def read_tensor(
    path: Path, name: str, dtype: torch.dtype, device: str | torch.device = "cpu"
) -> Tensor:
    """Read one parameter; without a change of dtype or device it is the file, mapped."""
    return read_stored(path, name).to(device, dtype)


def read_stored(path: Path, name: str) -> Tensor:
    """Read one parameter as it is stored; it is the file, mapped."""
    with open_safetensors(path) as file:
        tensor: Tensor = file.get_tensor(_stored_as(file, name))
    return tensor


def _stored_as(file: safe_open, name: str) -> str:
    """Return a parameter's name in a file; a tied embedding may be stored as the head alone."""
    return HEAD if name == EMBEDDING and name not in file.keys() else name  # noqa: SIM118


def require_match(
    source: Path,
    expected: Mapping[str, tuple[int, ...]],
    found: Mapping[str, tuple[int, ...]],
) -> None:
    """Raise InputError for tensors that are missing, extra or of another shape.

    Of each kind it names the first few and counts the rest. ``expected`` may be as long as a
    config claims: no more of it is read than ``found`` has, and a few.
    """
    if found and all(name.startswith(COMPILED) for name in found):
        raise InputError(
            f"{source}: its names begin with {COMPILED}, as torch.compile's do; save "
            f"model.{COMPILED[:-1]}.state_dict() in place of model.state_dict()"
        )
    known = [name for name in found if name in expected]
    missing = (f"{name} is missing" for name in expected if name not in found)
    extra = (f"{name} is not a parameter of it" for name in found if name not in expected)
    misshapen = [
        f"{name} is {list(found[name])} and should be {list(expected[name])}"
        for name in known
        if found[name] != expected[name]
    ]
    problems = [
        *_first_of(missing, len(expected) - len(known), "missing"),
        *_first_of(extra, len(found) - len(known), "no parameter of it"),
        *_first_of(iter(misshapen), len(misshapen), "of another shape"),
    ]
    if problems:
        raise InputError(f"{source}: does not fit its config: {'; '.join(problems)}")


def _first_of(problems: Iterator[str], count: int, kind: str) -> list[str]:
    """Return the first few of ``count`` problems, and a phrase that counts the rest."""
    first = list(islice(problems, FEW))
    more = count - len(first)
    return [*first, f"{more:,} more {'is' if more == 1 else 'are'} {kind}"] if more else first


def read_config(path: Path, files: list[Path]) -> ModelConfig:
    """Read the config from config.json or the files' metadata; raise InputError if they differ."""
    configs: dict[str, ModelConfig] = {}
    beside = files[0].parent / "config.json"
    if beside.is_file():
        configs[str(beside)] = ModelConfig.from_hf(read_json(beside), str(beside))
    for path_ in files:
        with open_safetensors(path_) as file:
            text = (file.metadata() or {}).get("config")
        if text is not None:
            source = f"{path_} (metadata)"
            configs[source] = ModelConfig.from_hf(parse_json(text, source), source)
    if not configs:
        raise InputError(f"{beside}: no such file, and {path} carries no config; put it there")
    (first, config), *others = configs.items()
    for source, other in others:
        if other != config:
            raise InputError(f"{first}: contradicts the config stored in {source}; keep one")
    return config
