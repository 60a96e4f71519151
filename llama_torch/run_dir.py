"""The run directory: which one, what it belongs to, and what training continues from."""

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import cli
from .checkpoint import (
    MODEL_FILE,
    RUN_FILE,
    STATE_FILE,
    load_state,
    require_match,
    save_model,
    save_state,
    write_directory_files,
    write_text,
)
from .config import InputError, TrainConfig, read_json
from .master_adamw import MasterAdamW
from .model import Llama

RUNS = Path("runs")


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
    for name in (MODEL_FILE, STATE_FILE, "config.json", "tokenizer.json", "tokenizer_config.json"):
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


def claim(config: TrainConfig, data_key: str) -> None:
    """Create the directory of a new run and note what it belongs to."""
    out = Path(config.out)
    identity = config.identity()
    try:
        # Of two runs that chose the same free number, one creates it.
        numbered = out.parent == RUNS and out.name.isdigit()
        out.mkdir(parents=True, exist_ok=not numbered)
        record = {
            "identity": identity,
            "data_key": data_key,
            "settings": dataclasses.asdict(dataclasses.replace(config, profile=False)),
        }
        write_text(out / RUN_FILE, json.dumps(record, indent=2) + "\n")
        write_directory_files(out, config.model)
    except FileExistsError:
        raise InputError(f"--out {out} was taken by another run just now; try again") from None
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


def save(out: Path, model: Llama, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Save the state training continues from, then export the model from it.

    Raises InputError, and leaves the last checkpoint, where a parameter is not finite.
    """
    parameters: dict[str, Tensor] = dict(model.named_parameters())
    for name, parameter in parameters.items():
        if not parameter.isfinite().all():
            raise InputError(
                f"{name} is not finite after step {step}; lower --lr (the last checkpoint stands)"
            )
    tensors: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        state = optimizer.state[parameter]
        if isinstance(optimizer, MasterAdamW):
            parameter = parameters[name] = optimizer.master(parameter).cpu()
        tensors[f"parameter.{name}"] = parameter
        tensors[f"exp_avg.{name}"] = state["exp_avg"]
        tensors[f"exp_avg_sq.{name}"] = state["exp_avg_sq"]
    save_state(out, tensors, step)
    save_model(out, model.config, parameters)


def restore(out: Path, model: Llama, optimizer: torch.optim.Optimizer) -> int:
    """Load the saved state into ``model`` and ``optimizer``; return the steps done.

    A run that was stopped before its first checkpoint starts from step 0. The export is
    written again, in case the run was killed between the state and it.
    """
    if not (out / STATE_FILE).exists():
        if (out / MODEL_FILE).exists():
            raise InputError(
                f"--resume: {out} has a model but no {STATE_FILE} to continue from; "
                "put it back, or start a new run with another --out"
            )
        write_directory_files(out, model.config)
        return 0
    tensors, step = load_state(out)
    parameters = dict(model.named_parameters())
    kinds = ("parameter", "exp_avg", "exp_avg_sq")
    expected = {f"{kind}.{n}": tuple(p.shape) for n, p in parameters.items() for kind in kinds}
    require_match(out / STATE_FILE, expected, {n: tuple(t.shape) for n, t in tensors.items()})
    with torch.no_grad():
        for name, parameter in parameters.items():
            device, master = parameter.device, tensors[f"parameter.{name}"]
            state = optimizer.state[parameter]
            if isinstance(optimizer, MasterAdamW):
                optimizer.set_master(parameter, master.to(device))
                state["step"] = torch.tensor(float(step))
            else:
                parameter.copy_(master)
                state["step"] = torch.tensor(float(step), device=device)
            for kind in ("exp_avg", "exp_avg_sq"):
                state[kind] = tensors[f"{kind}.{name}"].to(device)
    save_model(out, model.config, {n: tensors[f"parameter.{n}"] for n in parameters})
    return step
