"""The run directory: which one, what it belongs to, and what training continues from."""

import dataclasses
import fcntl
import json
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from . import checkpoints, cli, sharded
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
from .config import InputError, ModelConfig, TrainConfig, read_json
from .master_adamw import MasterAdamW
from .model import Llama
from .parallel import Parallel, is_launched, job_name

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
    if not is_launched():  # one process resumes what many began
        stored.pop("parallel", None)
    defaults = [*cli.as_flags(stored | {"out": str(out), "config": ""}), *defaults]
    return cli.parse(TrainConfig, argv, defaults)


def after_restart(argv: Sequence[str]) -> Sequence[str]:
    """Return the flags with which torchrun's second attempt at a job continues the first.

    That is the run which bears the job's name, or which is in the --out it was given.
    """
    early = cli.early_flags(argv)
    if early.config:
        early = cli.early_flags([*cli.toml_flags(early.config, TrainConfig), *argv])
    outs = [Path(early.out)] if early.out else list(_runs().values())
    began = (out for out in outs if (out / RUN_FILE).is_file())
    found = [out for out in began if _stored(out).get("job") == job_name()]
    if early.resume or not found:
        return argv
    return [*argv, "--resume", "--out", str(found[-1])]


def require_shared(out: Path, parallel: Parallel) -> None:
    """Raise InputError unless all processes of a job see the same run in ``out``."""
    parallel.barrier()
    newest = checkpoints.newest(out) if (out / RUN_FILE).is_file() else None
    seen = -1 if not (out / RUN_FILE).is_file() else int(newest.name) if newest else 0
    with parallel.alike():
        if not parallel.agree(seen):
            raise InputError(
                f"--out {out}: not every process sees what the first one wrote there; choose a "
                "directory on a disk that all machines share"
            )


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
        "job": job_name(),
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
    tensors = training_state(model, optimizer)
    exported = {name: tensors[f"parameter.{name}"] for name in parameters}

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


class Saver:
    """Saves a run's checkpoints: one process all of it, or each its shards.

    Shards on a GPU are copied to the host, and written while training goes on.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: Llama,
        optimizer: torch.optim.Optimizer,
        parallel: Parallel,
    ) -> None:
        self.out, self.keep_last, self.parallel = Path(config.out), config.keep_last, parallel
        self.model, self.optimizer = model, optimizer
        self.keeps_best = config.keep_best and parallel.is_first and not parallel.is_sharded
        self.best = best_loss(self.out) if self.keeps_best else 0.0
        self.pending: tuple[int, sharded.Saving] | None = None

    def validated(self, step: int, val_loss: float) -> None:
        """Keep the model if it is the best so far. No process of a sharded run holds it."""
        if self.keeps_best and val_loss < self.best:
            save_best(self.out, self.model, self.optimizer, step, val_loss)
            self.best = val_loss

    def save(self, step: int, skipped: Sequence[int], waits: bool) -> list[int]:
        """Save what training continues from; return the steps whose checkpoints are complete."""
        if not self.parallel.is_sharded:
            if self.parallel.is_first:
                save(self.out, self.model, self.optimizer, step, skipped, self.keep_last)
            self.parallel.barrier()
            return [step]
        saved, final = self._finish(), checkpoints.final_folder(self.out, step)
        tensors = training_state(self.model, self.optimizer)
        local = (t.to_local() if isinstance(t, DTensor) else t for t in tensors.values())
        good = torch.stack([tensor.isfinite().all() for tensor in local]).all()
        bad = self.parallel.most(int(not good))
        with self.parallel.alike():
            if bad:
                raise InputError(
                    f"a parameter or moment is not finite after step {step}; lower --lr (the last "
                    "checkpoint stands)"
                )
        with checkpoints.writing(final):
            if self.parallel.is_first:
                sharded.write_notes(checkpoints.begin(final), step, skipped)
        self.parallel.barrier()
        folder = checkpoints.temporary(final)
        if next(iter(tensors.values())).is_cuda:
            self.pending = step, sharded.Saving(folder, tensors, self.parallel.talk())
            return saved + (self._finish() if waits else [])
        with self._clearing(folder):
            sharded.save(folder, tensors)
        return [*saved, self._commit(step)]

    def export(self) -> None:
        """Write the newest checkpoint's model beside it, where training has not done so already."""
        if self.parallel.is_sharded and self.parallel.is_first:
            folder = checkpoints.newest(self.out)
            assert folder is not None
            gather(self.out, folder, self.model.config)
        self.parallel.barrier()

    def completed(self) -> list[int]:
        """Return the steps whose checkpoints have been completed since the last call."""
        if self.pending and not self.parallel.most(int(not self.pending[1].is_done())):
            return self._finish()
        return []

    def _finish(self) -> list[int]:
        if self.pending is None:
            return []
        step, saving = self.pending
        with self._clearing(saving.folder):
            saving.wait()
        self.pending = None
        return [self._commit(step)]

    @contextmanager
    def _clearing(self, folder: Path) -> Iterator[None]:
        """Leave nothing of what could not be written."""
        try:
            yield
        except InputError:
            shutil.rmtree(folder, ignore_errors=True)
            raise

    def _commit(self, step: int) -> int:
        self.parallel.barrier()
        if self.parallel.is_first:
            final = checkpoints.final_folder(self.out, step)
            with checkpoints.writing(final):
                checkpoints.finish(final)
            checkpoints.prune(self.out, self.keep_last)
        self.parallel.barrier()
        return step


def training_state(model: Llama, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return parameters and moments by the names that a checkpoint gives them."""
    exported, tensors = _export(model, optimizer), {}
    for name, parameter in model.named_parameters():
        state = optimizer.state[parameter]
        tensors[f"parameter.{name}"] = exported[name].detach()
        for kind in ("exp_avg", "exp_avg_sq"):  # which the first update makes
            moment = state[kind] if state else torch.zeros_like(parameter, requires_grad=False)
            tensors[f"{kind}.{name}"] = moment
    return tensors


def restore(
    out: Path,
    model: Llama,
    optimizer: torch.optim.Optimizer,
    parallel: Parallel | None = None,
) -> tuple[int, list[int]]:
    """Load the newest checkpoint; return the number of steps done, and which were skipped.

    A run that was stopped before its first checkpoint starts from step 0. The export is
    written again, in case the run was killed between the checkpoint and it. Whether one process
    or many wrote the checkpoint, any number can read it.
    """
    parallel = parallel or Parallel()
    if parallel.is_first:
        checkpoints.sweep(out)
    parallel.barrier()
    folder = checkpoints.newest(out)
    if folder is None:
        if (out / MODEL_FILE).exists():
            raise InputError(
                f"--resume: {out} has a model but no checkpoint in {checkpoints.FOLDER}/ to "
                "continue from; put it back, or start a new run with another --out"
            )
        if parallel.is_first:
            write_directory_files(out, model.config)
        return 0, []
    try:
        tensors, step, skipped = _read(folder, model, optimizer, parallel)
        if folder.name != str(step):
            raise InputError(f"{folder}: is of step {step}; rename it")
    except InputError as error:
        older = checkpoints.newest(out, before=int(folder.name))
        remedy = "start a new run with another --out"
        if older:
            remedy = f"delete {folder} to continue from step {older.name}"
        raise InputError(f"--resume: {error}; or {remedy}") from None
    if parallel.is_sharded and not sharded.holds(folder):
        tensors = _take_shards(folder, tensors, model, optimizer, parallel)
    _assign(tensors, model, optimizer, step - len(skipped))
    if parallel.is_first and not parallel.is_sharded:
        names = (name for name, _ in model.named_parameters())
        save_model(out, model.config, {n: tensors[f"parameter.{n}"] for n in names})
    return step, skipped


def _read(
    folder: Path, model: Llama, optimizer: torch.optim.Optimizer, parallel: Parallel
) -> tuple[dict[str, Tensor], int, list[int]]:
    """Return a checkpoint's tensors, the number of its steps, and those skipped.

    Tensors of one file are whole; others are laid out as the model's are.
    """
    parameters = dict(model.named_parameters())
    kinds = ("parameter", "exp_avg", "exp_avg_sq")
    expected = {f"{kind}.{n}": tuple(p.shape) for n, p in parameters.items() for kind in kinds}
    if sharded.holds(folder):
        step, skipped = sharded.read_notes(folder)
        if not parallel.is_sharded:
            require_match(folder, expected, sharded.shapes(folder))
            return sharded.load_whole(folder, expected), step, skipped
        tensors = _like_state(model, optimizer)
        sharded.load(folder, tensors)
        return tensors, step, skipped
    whole, step, skipped = load_state(folder)
    require_match(folder / STATE_FILE, expected, {n: tuple(t.shape) for n, t in whole.items()})
    return whole, step, skipped


def _like_state(model: Llama, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    state = training_state(model, optimizer)
    return {name: torch.empty_like(tensor) for name, tensor in state.items()}


def _take_shards(
    folder: Path,
    whole: dict[str, Tensor],
    model: Llama,
    optimizer: torch.optim.Optimizer,
    parallel: Parallel,
) -> dict[str, Tensor]:
    """Return every process's shards, out of a copy in the other form, which does not remain."""
    tensors = _like_state(model, optimizer)
    copy = folder.with_name(f"{folder.name}.shards{checkpoints.TEMPORARY}")
    if parallel.is_first:
        try:
            sharded.save(copy, whole, alone=True)
        except InputError as error:
            raise InputError(f"--resume: {error}; make room there") from None
    parallel.barrier()
    sharded.load(copy, tensors)
    parallel.barrier()
    if parallel.is_first:
        shutil.rmtree(copy, ignore_errors=True)
    return tensors


@torch.no_grad()
def _assign(
    tensors: dict[str, Tensor], model: Llama, optimizer: torch.optim.Optimizer, updates: int
) -> None:
    for name, parameter in model.named_parameters():
        device, master = parameter.device, tensors[f"parameter.{name}"]
        state = optimizer.state[parameter]
        if isinstance(optimizer, MasterAdamW):
            optimizer.set_master(parameter, master.to(device))
            state["step"] = torch.tensor(float(updates))
        else:
            parameter.copy_(master)
            state["step"] = torch.tensor(float(updates), device=device)
        for kind in ("exp_avg", "exp_avg_sq"):
            state[kind] = tensors[f"{kind}.{name}"].to(device)


def gather(out: Path, folder: Path, config: ModelConfig) -> None:
    """Write the Hugging Face directory ``out`` from a checkpoint, as one process."""
    prefix = "parameter."
    if sharded.holds(folder):
        names = [name for name in sharded.shapes(folder) if name.startswith(prefix)]
        tensors = sharded.load_whole(folder, names)
    else:
        tensors, _, _ = load_state(folder)
    parameters = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    with torch.device("meta"):
        expected = {n: tuple(p.shape) for n, p in Llama(config).named_parameters()}
    require_match(folder, expected, {n: tuple(t.shape) for n, t in parameters.items()})
    write_directory_files(out, config)
    save_model(out, config, parameters)
