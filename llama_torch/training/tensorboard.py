"""Write TensorBoard events synchronously: a kill loses none, and errors reach the caller."""

import time
from pathlib import Path
from types import TracebackType

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard import summary

from llama_common.errors import InputError, is_digits, printable

NAME = "events.out.tfevents."


class EventWriter:
    """Writes a new event file in ``folder``; from step ``first`` on it supersedes earlier ones.

    Readers take files in the order of their names, where torch's SummaryWriter puts the time of
    day: after a clock was set back, a resumed run's would come first and be purged itself.
    """

    def __init__(self, folder: Path, first: int = 0) -> None:
        self.path = folder
        try:
            folder.mkdir(exist_ok=True)
            self.path = folder / f"{NAME}{_next_number(folder):010d}.run"
            self.file = self.path.open("xb")
        except OSError as error:
            raise self._error(error) from None
        self.records, self.first = RecordWriter(self.file), first

    def __enter__(self) -> "EventWriter":
        try:
            self._write(Event(file_version="brain.Event:2"))
            start = SessionLog(status=SessionLog.START)
            self._write(Event(step=self.first, session_log=start))
        except InputError as error:
            self.__exit__(type(error), error, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.file.close()
        except OSError as error:  # what could not be written still cannot
            if kind is None:
                raise self._error(error) from None

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        """Add one point of a curve."""
        self._add(Summary(value=[Summary.Value(tag=tag, simple_value=value)]), step)

    def add_text(self, tag: str, text: str, step: int) -> None:
        """Add a text, whose lines stay and whose other control characters are escaped."""
        lines = [printable(line) for line in text.split("\n")]
        self._add(summary.text(tag, "\n".join(lines)), step)

    def _add(self, made: Summary, step: int) -> None:
        self._write(Event(step=step, summary=made))

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()  # for people: nothing is ordered by it
        try:
            self.records.write(event.SerializeToString())
            self.records.flush()
        except OSError as error:
            raise self._error(error) from None

    def _error(self, error: OSError) -> InputError:
        return InputError(f"{self.path}: cannot be written ({error}); the last checkpoint stands")


def _next_number(folder: Path) -> int:
    numbers = (path.name.removeprefix(NAME).split(".")[0] for path in folder.glob(f"{NAME}*"))
    return 1 + max((int(number) for number in numbers if is_digits(number)), default=0)
