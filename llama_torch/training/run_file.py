"""Read and write run.json, a run's record: its settings, what a resumption shares, its text."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_common.errors import InputError, flag_of
from llama_common.settings import Settings, check_settings

from ..checkpoint.file_names import RUN_FILE
from ..common.state_file import abridged, read_state, require_count, write_state
from ..config import RunConfig, TrainConfig
from ..finetuning_config import RewardConfig, SftConfig
from ..ppo_config import PpoConfig

# Of each kind of run, by the name that run.json has for it.
CONFIGS: Mapping[str, type[RunConfig]] = {
    config.task: config for config in (TrainConfig, SftConfig, RewardConfig, PpoConfig)
}
PER_START = ("config", "out", "resume")  # settings of one start of a run, not of the run


@dataclass(frozen=True)
class RunRecord:
    """What run.json says of a run, its settings by the names of the config's fields."""

    path: Path
    config_class: type[RunConfig]  # of the command that began the run
    settings: Settings
    identity: Settings  # those that determine the losses
    data_key: str
    job: str  # of torchrun; empty without
    directory: str  # where a relative --data was found; empty in runs of earlier versions


def read_run(out: Path) -> RunRecord:
    """Read the record of the run in ``out``.

    Raises InputError where there is none, and for a record that is damaged, naming file and key.
    """
    path = out / RUN_FILE
    if not path.is_file():
        raise InputError(f"--resume: {out} holds no run; leave --resume out to start one there")
    found = read_record(path)
    texts = [found.get(key, "") for key in ("data_key", "job", "directory")]
    tables = [found.get(key) for key in ("settings", "identity")]
    if not all(isinstance(text, str) for text in texts) or "\0" in "".join(texts):
        raise InputError(f"{path}: data_key, job or directory is not valid text; correct it")
    if not all(isinstance(table, dict) for table in tables):
        raise InputError(f"{path}: is not this package's; start anew in another --out")
    config_class = _config_class(found.get("task", TrainConfig.task), path)
    settings, identity = (check_settings(t or {}, config_class, str(path)) for t in tables)
    for key in PER_START:
        settings.pop(key, None)
    return RunRecord(path, config_class, settings, identity, *texts)


def _config_class(task: object, path: Path) -> type[RunConfig]:
    """Return the config class of a kind of run; InputError for one that there is not."""
    if not isinstance(task, str) or task not in CONFIGS:
        raise InputError(
            f"{path}: task is {abridged(task)}, not one of {', '.join(CONFIGS)}; put it back, or "
            "continue the run with the version that began it"
        )
    return CONFIGS[task]


def read_record(path: Path) -> dict[str, Any]:
    """Return the object in run.json; raise InputError for one that is not as it was written."""
    found, _ = read_state(path, "put it back as it was, or delete its sha256 to keep the change")
    lengths = found.get("lengths", [])
    try:
        for entry in lengths if isinstance(lengths, list) else [lengths]:
            if not isinstance(entry, dict) or entry.keys() != {"until_step", "steps"}:
                raise ValueError(f"lengths holds {abridged(entry)}")
            require_count("until_step of lengths", entry["until_step"])
            require_count("steps of lengths", entry["steps"], 1)
    except ValueError as error:
        raise InputError(f"{path}: {error}; correct it, or remove lengths") from None
    return found


def write_record(path: Path, content: Mapping[str, Any]) -> None:
    """Write run.json atomically."""
    write_state(path, content, indent=2)


def require_consistent(record: RunRecord) -> None:
    """Raise InputError where run.json names one setting with two values, as a change leaves it.

    Steps are left to ``run_length``.
    """
    for key, setting in record.identity.items():
        given = record.settings.get(key, setting).value
        if key != "steps" and given != setting.value:
            raise InputError(
                f"{record.path}: {key} is {abridged(_as_stored(given))} in its settings and "
                f"{abridged(_as_stored(setting.value))} in its identity; put it back as it was"
            )


def check_resume_config(config: RunConfig, data_key: str | None = None) -> None:
    """Raise InputError unless config and, if given, the data's hash are those of the run."""
    record = read_run(Path(config.out))
    require_consistent(record)
    differing = differences(record.identity, config)
    if data_key is not None and record.data_key != data_key:
        began, here = record.directory, os.getcwd()
        where = f" (this is {here}; it began in {began})" if began not in ("", here) else ""
        differing.append(f"{config.data.hashed} has changed{where}")
    if differing:
        raise InputError(
            f"--resume: {config.out} belongs to another config: {'; '.join(differing)}; drop these "
            "flags to continue it, or start a new run with another --out"
        )


def differences(stored: Settings, config: RunConfig) -> list[str]:
    """Return a line for each setting that determines the losses and is another in ``config``."""
    # A setting that did not exist when the run began had its default's effect.
    there, here = {**_identity(type(config)()), **stored}, _identity(config)
    return [
        f"{flag_of(key)} is {_as_stored(there[key].value)} there and "
        f"{_as_stored(here[key].value)} here"
        for key in sorted(here)
        if key != "steps" and there[key].value != here[key].value  # see run_length.py
    ]


def _as_stored(value: object) -> object:
    """Return a value as run.json has it, for a message."""
    return list(value) if isinstance(value, tuple) else value


def _identity(config: RunConfig) -> Settings:
    return check_settings(config.identity(), type(config), "")
