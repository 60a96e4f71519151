"""The run directory: which one, what it belongs to, and what training continues from."""

import dataclasses
import fcntl
import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import checkpoints, cli
from .checkpoint import (
    MODEL_FILE,
    RUN_FILE,
    STATE_FILE,
    load_state,
    read_notes,
    require_match,
    save_model,
    save_state,
    write_directory_files,
    write_text,
)
from .checkpoints import BEST
from .config import InputError, TrainConfig, read_json
from .master_adamw import MasterAdamW
from .model import Llama

RUNS = Path("runs")
LOCK_FILE = "lock"


def resolve_config(argv: Sequence[str]) -> TrainConfig:
    """Build the settings of this run: defaults, then TOML, then flags; ``out`` is filled in.

    With --resume the run's own stored settings take the defaults' place. Raises InputError for
    a setting that is wrong, a directory that holds another run, or one that cannot be written.
    """
    early = cli.early_flags(argv)
    defaults = cli.toml_flags(early.config, TrainConfig) if early.config else []
    early = cli.early_flags([*defaults, *argv])  # the TOML file may name --out
    if not early.resume:
        config = cli.parse(TrainConfig, argv, defaults)
        config = dataclasses.replace(config, out=config.out or str(_next_run()))
        _require_free(Path(config.out))
        return config
    out = Path(early.out) if early.out else _latest_run()
    stored = _stored(out)["settings"]
    defaults = [*cli.as_flags(stored | {"out": str(out), "config": ""}), *defaults]
    return cli.parse(TrainConfig, argv, defaults)


def _runs() -> dict[int, Path]:
    numbered = {int(p.name): p for p in RUNS.glob("*") if p.name.isdigit()}
    return dict(sorted(numbered.items()))


def _next_run() -> Path:
    return RUNS / str(max(_runs(), default=0) + 1)


def _latest_run() -> Path:
    runs = [path for path in _runs().values() if (path / RUN_FILE).is_file()]
    if not runs:
        raise InputError("--resume: no run in runs/; name its directory with --out")
    return runs[-1]


def _stored(out: Path) -> dict[str, Any]:
    if not (out / RUN_FILE).is_file():
        raise InputError(f"--resume: {out} holds no run; leave --resume out to start one there")
    stored = read_json(out / RUN_FILE)
    if not all(isinstance(stored.get(key), dict) for key in ("identity", "settings")):
        raise InputError(f"{out / RUN_FILE}: is not this package's; start anew in another --out")
    return stored


def _require_free(out: Path) -> None:
    try:
        _require_free_and_writable(out)
    except OSError as error:
        raise InputError(f"--out {out} cannot be used ({error}); choose another") from None


def _require_free_and_writable(out: Path) -> None:
    if (out / RUN_FILE).exists():
        raise InputError(
            f"--out {out} already holds a run; add --resume to continue it, or choose another"
        )
    files = (MODEL_FILE, STATE_FILE, "config.json", "tokenizer.json", "tokenizer_config.json")
    for name in (*files, checkpoints.FOLDER, BEST):
        if (out / name).exists():
            raise InputError(f"--out {out} already holds a {name}; choose another directory")
    nearest = out
    while not nearest.exists():
        nearest = nearest.parent
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise InputError(f"--out {out} cannot be written below {nearest}; choose another directory")


def require_same(config: TrainConfig, data_key: str | None = None) -> None:
    """Check that a resumed run's settings, and its text once its hash is known, are its own."""
    out = Path(config.out)
    stored = _stored(out)
    # A setting that did not exist when the run began had its default's effect.
    identity = _over(TrainConfig().identity(), stored["identity"])
    differing = _differences(identity, config.identity())
    if data_key is not None and stored.get("data_key") != data_key:
        differing.append("the text of --data has changed")
    if differing:
        raise InputError(
            f"--resume: {out} belongs to another config: {'; '.join(differing)}; drop these "
            "flags to continue it, or start a new run with another --out"
        )


@contextmanager
def lock(out: Path) -> Iterator[None]:
    """Hold a run directory, which is made if need be; InputError if another trainer does.

    The lock is the open file's and dies with the process; the file stays. A file system without
    locks holds nobody back.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        file = (out / LOCK_FILE).open("w")
    except OSError as error:
        raise InputError(f"--out {out} cannot be written ({error}); choose another") from None
    with file:
        # Data workers may outlive a killed trainer, and must not hold the run meanwhile.
        os.register_at_fork(after_in_child=file.close)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"--out {out} is in use by another trainer; wait for its end, or choose another"
            ) from None
        except OSError:
            pass
        yield


def claim(config: TrainConfig, data_key: str) -> None:
    """Note in a new run's directory, which is locked, what it belongs to."""
    out = Path(config.out)
    _require_free(out)  # another run may have come and gone while this one was prepared
    record = {
        "identity": config.identity(),
        "data_key": data_key,
        "settings": dataclasses.asdict(dataclasses.replace(config, profile=False)),
    }
    try:
        write_text(out / RUN_FILE, json.dumps(record, indent=2) + "\n")
        write_directory_files(out, config.model)
    except OSError as error:
        raise InputError(f"--out {out} cannot be written ({error}); choose another") from None


def _over(defaults: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Return ``defaults`` with what is given in their places."""
    nested = {k: _over(v, given[k]) for k, v in defaults.items() if isinstance(given.get(k), dict)}
    return {**defaults, **given, **nested}


def _differences(stored: dict[str, Any], asked: dict[str, Any]) -> list[str]:
    differing = []
    for name in sorted(stored.keys() | asked.keys()):
        there, here = stored.get(name), asked.get(name)
        if isinstance(there, dict) and isinstance(here, dict):
            differing += _differences(there, here)
        elif there != here:
            differing.append(f"--{name.replace('_', '-')} is {there} there and {here} here")
    return differing


def save(
    out: Path,
    model: Llama,
    optimizer: torch.optim.Optimizer,
    step: int,
    skipped: Sequence[int] = (),
    keep_last: int = 2,
) -> None:
    """Save the state training continues from, then export the model from it.

    Raises InputError, and leaves the last checkpoint, where a parameter is not finite.
    """
    parameters: dict[str, Tensor] = dict(model.named_parameters())
    for name, parameter in parameters.items():
        if not parameter.isfinite().all():
            raise InputError(
                f"{name} is not finite after step {step}; lower --lr (the last checkpoint stands)"
            )
    exported, tensors = _export(model, optimizer), {}
    for name, parameter in parameters.items():
        state = optimizer.state[parameter]
        tensors[f"parameter.{name}"] = exported[name]
        for kind in ("exp_avg", "exp_avg_sq"):  # which the first update makes
            moment = state[kind] if state else torch.zeros_like(parameter)
            tensors[f"{kind}.{name}"] = moment

    def write(folder: Path) -> None:
        save_state(folder, tensors, step, skipped)

    checkpoints.commit(out, step, write, keep_last)
    save_model(out, model.config, exported)


def save_best(
    out: Path, model: Llama, optimizer: torch.optim.Optimizer, step: int, val_loss: float
) -> None:
    """Export the model to best/, a Hugging Face model directory, with its step and loss."""
    exported = _export(model, optimizer)
    notes = {"step": str(step), "val_loss": repr(val_loss)}

    def write(folder: Path) -> None:
        write_directory_files(folder, model.config)
        save_model(folder, model.config, exported, notes)

    if (out / BEST).is_dir():  # the rest of it never changes
        save_model(out / BEST, model.config, exported, notes)
    else:
        checkpoints.make_folder(out / BEST, write)


def best_loss(out: Path) -> float:
    """Return the lowest validation loss so far: that of the model in best/."""
    if not (out / BEST).is_dir():
        return math.inf
    try:
        return float(read_notes(out / BEST / MODEL_FILE).get("val_loss", "inf"))
    except InputError as error:
        raise InputError(f"--resume: {error}; or delete {out / BEST} to go on without it") from None


def _export(model: Llama, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the parameters as a checkpoint holds them: in float32 where training keeps that."""
    parameters: dict[str, Tensor] = dict(model.named_parameters())
    if isinstance(optimizer, MasterAdamW):
        return {name: optimizer.master(p).cpu() for name, p in parameters.items()}
    return parameters


def restore(out: Path, model: Llama, optimizer: torch.optim.Optimizer) -> tuple[int, list[int]]:
    """Load the newest checkpoint; return the number of steps done, and which were skipped.

    A run that was stopped before its first checkpoint starts from step 0. The export is
    written again, in case the run was killed between the checkpoint and it.
    """
    checkpoints.sweep(out)
    folder = checkpoints.newest(out)
    if folder is None:
        if (out / MODEL_FILE).exists():
            raise InputError(
                f"--resume: {out} has a model but no checkpoint in {checkpoints.FOLDER}/ to "
                "continue from; put it back, or start a new run with another --out"
            )
        write_directory_files(out, model.config)
        return 0, []
    parameters = dict(model.named_parameters())
    kinds = ("parameter", "exp_avg", "exp_avg_sq")
    expected = {f"{kind}.{n}": tuple(p.shape) for n, p in parameters.items() for kind in kinds}
    try:
        tensors, step, skipped = load_state(folder)
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        require_match(folder / STATE_FILE, expected, shapes)
        if folder.name != str(step):
            raise InputError(f"{folder / STATE_FILE}: is of step {step}; rename its folder")
    except InputError as error:
        older = checkpoints.newest(out, before=int(folder.name))
        remedy = "start a new run with another --out"
        if older:
            remedy = f"delete {folder} to continue from step {older.name}"
        raise InputError(f"--resume: {error}; or {remedy}") from None
    updates = float(step - len(skipped))
    with torch.no_grad():
        for name, parameter in parameters.items():
            device, master = parameter.device, tensors[f"parameter.{name}"]
            state = optimizer.state[parameter]
            if isinstance(optimizer, MasterAdamW):
                optimizer.set_master(parameter, master.to(device))
                state["step"] = torch.tensor(updates)
            else:
                parameter.copy_(master)
                state["step"] = torch.tensor(updates, device=device)
            for kind in ("exp_avg", "exp_avg_sq"):
                state[kind] = tensors[f"{kind}.{name}"].to(device)
    save_model(out, model.config, {n: tensors[f"parameter.{n}"] for n in parameters})
    return step, skipped
