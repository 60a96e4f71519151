"""Save checkpoints as one file, and the best model, from the main process."""

import math
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from torch import Tensor
from torch.optim import Optimizer

from llama_common.errors import InputError

from ..checkpoint import step_folders
from ..checkpoint.directory_files import write_directory_files
from ..checkpoint.file_names import MODEL_FILE
from ..checkpoint.hf import read_metadata, save_model
from ..checkpoint.single_file import SingleFile
from ..checkpoint.state_interface import PARAMETER, TrainingState
from ..checkpoint.step_folders import BEST
from ..common.state_file import CHECKSUM, abridged, verified, with_checksum
from ..distributed.parallel import Parallel
from ..model.llama import Llama
from .state_tensors import exported, state_tensors, stored_parameters


class FileSaver:
    """Saves unsharded checkpoints from the main process; implements Saver."""

    def __init__(
        self,
        out: Path,
        model: Llama,
        optimizer: Optimizer,
        parallel: Parallel,
        keep_last: int,
        keep_best: bool,
    ) -> None:
        self.out, self.model, self.optimizer = out, model, optimizer
        self.parallel, self.keep_last = parallel, keep_last
        self.keeps_best = keep_best and parallel.is_main_process
        self.best_loss = read_best_loss(out) if self.keeps_best else 0.0

    def validated(self, step: int, val_loss: float) -> None:
        """Save the model to best/ if its validation loss is the lowest so far."""
        if self.keeps_best and val_loss < self.best_loss:
            save_best(self.out, self.model, self.optimizer, step, val_loss)
            self.best_loss = val_loss

    def save(self, step: int, skipped: Sequence[int], wait: bool) -> list[int]:
        """Save the training state as one file and export the model; return [step].

        Raises InputError, and keeps the last checkpoint, where a parameter is not finite.
        """
        if self.parallel.is_main_process:
            self._save(step, skipped)
        self.parallel.barrier()
        return [step]

    def completed(self) -> list[int]:
        """Return no steps: ``save`` returns when its checkpoint is complete."""
        return []

    def export(self) -> None:
        """Do nothing: ``save`` exports each checkpoint's model."""

    def _save(self, step: int, skipped: Sequence[int]) -> None:
        parameters: dict[str, Tensor] = dict(self.model.named_parameters())
        for name, parameter in parameters.items():
            if not parameter.isfinite().all():
                raise InputError(
                    f"{name} is not finite after step {step}; lower --lr (the last checkpoint "
                    "stands)"
                )
        state = TrainingState(state_tensors(self.model, self.optimizer), step, skipped)
        write = partial(_write_single_file, state)
        step_folders.commit(self.out, step, write, self.keep_last)
        stored = {name: state.tensors[PARAMETER + name] for name in parameters}
        save_model(self.out, self.model.config, exported(stored))


def _write_single_file(state: TrainingState, folder: Path) -> None:
    SingleFile(folder).write(state)


def save_best(out: Path, model: Llama, optimizer: Optimizer, step: int, val_loss: float) -> None:
    """Export the model to ``out``/best, a Hugging Face model directory.

    The safetensors metadata holds ``step`` and ``val_loss`` (nats per token). Raises InputError
    where the disk refuses the files.
    """
    stored = exported(stored_parameters(model, optimizer))
    metadata = with_checksum({"step": str(step), "val_loss": repr(val_loss)})

    def write(folder: Path) -> None:
        write_directory_files(folder, model.config, out)
        save_model(folder, model.config, stored, metadata)

    if (out / BEST).is_dir():  # config and tokenizer files of a run never change
        save_model(out / BEST, model.config, stored, metadata)
    else:
        step_folders.make_folder(out / BEST, write)


def read_best_loss(out: Path) -> float:
    """Return the validation loss of the model in best/, in nats per token; inf if there is none."""
    if not (out / BEST).is_dir():
        return math.inf
    path, remedy = out / BEST / MODEL_FILE, f"delete {out / BEST} to go on without it"
    try:
        found = read_metadata(path)
    except InputError as error:
        raise InputError(f"--resume: {error}; or {remedy}") from None
    metadata = {key: found[key] for key in ("step", "val_loss", CHECKSUM) if key in found}
    val_loss = verified(metadata, f"--resume: {path}", remedy)[0].get("val_loss", "")
    # As repr spells a finite loss. That of a policy is the negative of its reward.
    if not re.fullmatch(r"-?\d{1,20}(\.\d{1,20})?(e-\d{1,3})?", val_loss, re.ASCII):
        raise InputError(f"--resume: {path}: its val_loss is {abridged(val_loss)}; {remedy}")
    return float(val_loss)
