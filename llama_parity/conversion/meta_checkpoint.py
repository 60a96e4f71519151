"""Meta's form of a Llama: ``consolidated.NN.pth`` files and ``params.json``.

It differs from Hugging Face's in names, in the order of the query and key rows (Meta rotates the
pairs (2i, 2i + 1) of a head, Hugging Face (i, i + K / 2)), and in how a model is cut into files.
Nothing is computed: bits move.

Meta's own loaders disagree on the embedding: Llama 1 and 2 cut its columns, Llama 3 its rows.
Reading goes by the shapes; writing cuts rows where the rotary base or scaling is Llama 3's.
"""

import re
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from llama_common.errors import InputError
from llama_common.files import write_json
from llama_torch.checkpoint.file_names import META_FILES
from llama_torch.checkpoint.hf import DTYPES, require_match
from llama_torch.model.config import ModelConfig
from llama_torch.model.shapes import ParameterShapes
from reference_np.naming import EMBED, LM_HEAD

from .lazy_weights import Model, Weight, stored, with_progress, write_file
from .meta_names import meta_name
from .meta_params import config_from, is_llama3, params_of, read_params


def split_axis(name: str, embedding_axis: int) -> int | None:
    """Return the axis along which Meta cuts a parameter of that (Meta's) name; None = it is not."""
    kind = name.removesuffix(".weight").rpartition(".")[2]
    if kind.endswith("norm"):
        return None
    if kind == "tok_embeddings":
        return embedding_axis
    return 1 if kind in ("wo", "w2") else 0


def half_rows(n_heads: int, n_rows: int) -> Tensor:
    """Return which of Meta's rows each of Hugging Face's is, int [n_rows].

    Of each head first the even rows, then the odd: the pair (2i, 2i + 1) becomes (i, i + K / 2).
    """
    return torch.arange(n_rows).view(n_heads, -1, 2).transpose(1, 2).flatten()


def rotary_rows(name: str, config: ModelConfig) -> Tensor | None:
    """Return ``half_rows`` of a query or key matrix, None for any other parameter."""
    for kind, n_heads in (("q_proj", config.n_heads), ("k_proj", config.n_kv_heads)):
        if name.endswith(f"{kind}.weight"):
            return half_rows(n_heads, n_heads * config.head_dim)
    return None


def read_meta(folder: Path, max_seq_len: int, factor: float) -> Model:
    """Open a directory of consolidated files; equal input and output embeddings become tied.

    Raises InputError for files that cannot be read or do not belong together, for keys of
    params.json that are unknown, and naming all that contradicts the weights.
    """
    path = folder / "params.json"
    params = read_params(path)
    parts = load_parts(folder)
    embedding = parts[0].get("tok_embeddings.weight", torch.empty(0))
    embedding_axis = 0 if embedding.shape[1:] == (params["dim"],) else 1
    found = {}
    for name, piece in parts[0].items():
        axis = split_axis(name, embedding_axis)
        found[name] = tuple(n * len(parts) if i == axis else n for i, n in enumerate(piece.shape))
    if params.get("vocab_size", -1) == -1:
        params["vocab_size"] = (*found.get("tok_embeddings.weight", ()), 1)[0]
    config = config_from(params, path, max_seq_len, factor)
    check_widths(config, found, path)
    expected = ParameterShapes(replace(config, tie_embeddings=False))
    require_match(folder, {meta_name(name): shape for name, shape in expected.items()}, found)
    weights = {}
    for name, shape in expected.items():
        pieces = [part[meta_name(name)] for part in parts]
        axis = split_axis(meta_name(name), embedding_axis)
        read = partial(_joined, pieces, axis, rotary_rows(name, config))
        weights[name] = Weight(shape, pieces[0].dtype, read)
    if same_bits(weights[EMBED].read(), weights[LM_HEAD].read()):
        del weights[LM_HEAD]
        config = replace(config, tie_embeddings=True)
    return Model(config, weights)


def _joined(pieces: list[Tensor], axis: int | None, rows: Tensor | None) -> Tensor:
    # A copy even of one piece: pieces may share memory, which safetensors refuses to save.
    whole = pieces[0].clone() if axis is None or len(pieces) == 1 else torch.cat(pieces, axis)
    return whole if rows is None else whole[rows]


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Return whether two tensors of one shape hold the same bytes: NaN equals itself here."""
    if left.dtype != right.dtype:
        return False
    return torch.equal(*(x.contiguous().flatten().view(torch.uint8) for x in (left, right)))


def load_parts(folder: Path) -> list[dict[str, Tensor]]:
    """Map the consolidated files; InputError unless they are the parts of one checkpoint."""
    files = {path.name for path in folder.glob(META_FILES)}
    names = [f"consolidated.{i:02}.pth" for i in range(len(files))]
    if missing := [name for name in names if name not in files]:
        raise InputError(f"{folder}: has {max(files)} but not {', '.join(missing)}; copy it too")
    parts = [load_part(folder / name) for name in names]
    for name, part in zip(names, parts, strict=True):
        differ = part.keys() ^ parts[0].keys()
        differ |= {key for key in part.keys() - differ if not _belongs(key, part, parts[0])}
        if differ:
            raise InputError(
                f"{folder / name}: of another checkpoint than {names[0]}, from which it differs in "
                f"{', '.join(sorted(differ))}; keep the files of one"
            )
    return parts


def _belongs(key: str, part: Mapping[str, Tensor], first: Mapping[str, Tensor]) -> bool:
    ours, theirs = part[key], first[key]
    if (ours.shape, ours.dtype) != (theirs.shape, theirs.dtype):
        return False
    return split_axis(key, 0) is not None or same_bits(ours, theirs)


def load_part(path: Path) -> dict[str, Tensor]:
    """Map one .pth file's tensors, without running code that it may hold."""
    try:
        with warnings.catch_warnings(action="ignore"):  # about old files, read or refused below
            # Only archives can be mapped, which torch writes since its version 1.6.
            mapped = zipfile.is_zipfile(path)
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # a damaged file can raise anything
        if code := re.search(r"GLOBAL (\S+)", str(error)):
            raise InputError(
                f"{path}: loading it would run code ({code[1]}); save its tensors alone"
            ) from None
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise InputError(
            f"{path}: not a complete file of torch.save ({reason}); copy it again"
        ) from None
    if not isinstance(content, dict) or not content:
        raise InputError(f"{path}: holds no tensors by name; save the model's state_dict")
    # params.json determines the table of rotations that some files hold.
    content = {key: x for key, x in content.items() if not str(key).endswith("rope.freqs")}
    if odd := [str(key) for key, x in content.items() if not _is_weight(key, x)]:
        raise InputError(f"{path}: {', '.join(odd)} is no float tensor; save the weights alone")
    return {key: x.detach() for key, x in content.items()}


def _is_weight(key: object, value: object) -> bool:
    if not isinstance(key, str) or not isinstance(value, Tensor):
        return False
    plain = value.layout == torch.strided and value.device.type == "cpu"
    # Strides of zero make a few stored numbers a tensor of any size.
    plain = plain and value.nbytes <= value.untyped_storage().nbytes()
    return plain and value.dtype in DTYPES.values()


def check_widths(config: ModelConfig, found: Mapping[str, tuple[int, ...]], path: Path) -> None:
    """Raise InputError naming every statement of params.json that the weights contradict."""
    named = (re.match(r"layers\.([0-9]{1,10})\.", name) for name in found)
    layers = {int(layer[1]) for layer in named if layer}
    n_layers = max(layers, default=-1) + 1
    # A name may claim any number of layers before it, and params.json as many.
    claims = [("n_layers", config.n_layers, n_layers if n_layers <= len(found) else len(layers))]
    wk = "layers.0.attention.wk"
    for claim, said, name in (
        ("dim", config.dim, "norm"),
        ("vocab_size", config.vocab_size, "tok_embeddings"),
        ("the hidden width", config.hidden_dim, "layers.0.feed_forward.w1"),
        ("n_kv_heads * dim / n_heads", config.n_kv_heads * config.head_dim, wk),
    ):
        if rows := found.get(f"{name}.weight"):
            claims.append((claim, said, rows[0]))
    if wrong := [f"{claim} is {said}, theirs {has}" for claim, said, has in claims if said != has]:
        raise InputError(
            f"{path}: contradicts the weights: {'; '.join(wrong)}; "
            "correct it, or add the consolidated files that are missing"
        )


def write_meta(folder: Path, model: Model, dtype: torch.dtype | None, shards: int) -> None:
    """Write params.json and the consolidated files; a tied model gets both of its matrices.

    torch.save writes a file at once: all of its tensors are in memory.
    """
    config = model.config
    embedding_axis = 0 if is_llama3(config.rope_theta) or config.rope_type == "llama3" else 1
    names = ParameterShapes(replace(config, tie_embeddings=False))
    for shard in range(shards):
        tensors = {}
        for name in with_progress(names, f"consolidated.{shard:02}.pth"):
            tensor = stored(name, model.weights.get(name, model.weights[EMBED]), dtype)
            if (rows := rotary_rows(name, config)) is not None:
                tensor = tensor[rows.argsort()]
            if (axis := split_axis(meta_name(name), embedding_axis)) is not None:
                tensor = tensor.chunk(shards, axis)[shard].contiguous()
            # torch.save writes all the memory that a tensor is a view of.
            whole = tensor.untyped_storage().nbytes() == tensor.nbytes
            tensors[meta_name(name)] = tensor if whole else tensor.clone()
        write_file(folder / f"consolidated.{shard:02}.pth", partial(torch.save, tensors))
    write_json(folder / "params.json", params_of(config))
