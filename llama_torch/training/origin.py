"""``--init-from``: take shape, tokenizer and first weights of a run from a model directory."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from llama_common import cli
from llama_common.errors import InputError, flag_of
from llama_common.files import read_json
from llama_common.settings import Setting, Settings, build, name_source

from ..checkpoint import step_folders
from ..config import RunConfig
from ..model.config import HF_KEYS, ModelConfig, is_reward_model
from ..tokenizer.encoding import GPT2, TextEncoding, load_encoding
from .run_file import RunRecord

CONFIG = "config.json"


class Origin(NamedTuple):
    """What a run begins from, or goes on with."""

    model: ModelConfig  # its max_seq_len is the model's own, which a training window may be below
    encoding: TextEncoding = GPT2
    directory: Path | None = None  # whose weights a run begins from; None: random, or a checkpoint


def parse_config(
    argv: Sequence[str], settings: Settings, directory: str, config_class: type[RunConfig]
) -> RunConfig:
    """Build a new run's config from flags and a file's settings, the model from ``directory``.

    ``directory`` is that of --init-from; empty = none. --max-seq-len is the model's own, or
    ``longest_window`` of the class where that is less. Raises InputError for one that holds no
    Llama, and for a flag or setting that contradicts its config.json.
    """
    if not directory:
        return cli.parse(config_class, argv, settings)
    path = Path(directory) / CONFIG
    found = _read_model(path, "--init-from ")
    own = dict(_settings_of(found, str(path)))
    window = min(found.max_seq_len, config_class.longest_window)
    own["max_seq_len"] = own["max_seq_len"]._replace(value=window)
    try:
        config = cli.parse(config_class, argv, {**own, **settings})
    except InputError as error:
        given = {word.partition("=")[0] for word in argv} | {flag_of(name) for name in settings}
        if given.isdisjoint(flag_of(name) for name in HF_KEYS if name != "max_seq_len"):
            raise
        raise InputError(f"{error}; the model is that of {path}: leave its shape out") from None
    try:
        _with_own_limit(config.model, found, path, "leave it out")
    except InputError as error:  # a file's value is named by the file
        raise InputError(name_source(str(error), settings, argv)) from None
    return config


def _settings_of(model: ModelConfig, source: str) -> Settings:
    values = dataclasses.asdict(model)
    floats = {name for name in values if type(getattr(ModelConfig, name)) is float}
    return {
        name: Setting(float(value) if name in floats else value, source)
        for name, value in values.items()
    }


def find_origin(config: RunConfig) -> Origin:
    """Return what a run begins from or, with --resume and a checkpoint, goes on with.

    Raises InputError for a directory that is gone or has changed, and for its tokenizer's faults.
    """
    if not config.init_from:
        return Origin(config.model)
    out, directory = Path(config.out), Path(config.init_from)
    goes_on = config.resume and step_folders.newest(out) is not None
    if config.resume and not goes_on and not directory.is_dir():
        raise InputError(
            f"--resume: {out} has no checkpoint yet, and {directory}, which it begins from, is no "
            "directory; put it back, or start a new run with another --out"
        )
    source = out if goes_on else directory
    path = source / CONFIG
    model = _with_own_limit(config.model, _read_model(path), path)
    encoding = load_encoding(source, model.vocab_size)
    return Origin(model, encoding, None if goes_on else directory)


def recorded_model(record: RunRecord) -> ModelConfig:
    """Return the model of a run that has a checkpoint."""
    model = build(ModelConfig, record.settings)
    if not _is_begun_from_weights(record):
        return model
    path = record.path.parent / CONFIG
    return _with_own_limit(model, _read_model(path), path)


def recorded_encoding(record: RunRecord) -> TextEncoding:
    """Return the encoding of a run's text."""
    if not _is_begun_from_weights(record):
        return GPT2
    return load_encoding(record.path.parent, build(ModelConfig, record.settings).vocab_size)


def _is_begun_from_weights(record: RunRecord) -> bool:
    return "init_from" in record.settings and bool(record.settings["init_from"].value)


def _read_model(path: Path, flag: str = "") -> ModelConfig:
    if not path.is_file():
        raise InputError(
            f"{flag}{path.parent}: holds no {CONFIG}; give the directory of a Llama in Hugging "
            "Face's form (tools/convert.py makes one of Meta's)"
        )
    hf = read_json(path)
    if flag and is_reward_model(hf):
        raise InputError(
            f"{flag}{path.parent}: is a reward model, which scores answers and writes none; give "
            "a language model's directory"
        )
    return ModelConfig.from_hf(hf, str(path))


def _with_own_limit(
    model: ModelConfig, found: ModelConfig, path: Path, remedy: str = "put that file back"
) -> ModelConfig:
    """Return ``model`` with the context of ``found``, the config in ``path``.

    Raises InputError for any other difference, and for a longer context.
    """
    limit = found.max_seq_len
    for name, value in dataclasses.asdict(model).items():
        own = getattr(found, name)
        if name != "max_seq_len" and value != own:
            key = f"{HF_KEYS.get(name, name)}={own}"
            raise InputError(f"{flag_of(name)} {value} contradicts {path} ({key}); {remedy}")
    if model.max_seq_len > limit:
        raise InputError(
            f"--max-seq-len {model.max_seq_len} is more than {path} allows "
            f"({HF_KEYS['max_seq_len']}={limit}); use at most that"
        )
    return found
