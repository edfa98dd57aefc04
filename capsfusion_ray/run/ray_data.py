"""What every Ray Data graph of this package shares: its settings, a datasource of read tasks, and errors as they were raised."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

# ray.data reads this when it is imported. A killed driver keeps its share of the cluster until its last request for it runs
# out, by default after 180 s: the resumed run would have half the CPUs for so long. A living driver asks again every 10 s.
os.environ.setdefault("RAY_DATA_AUTOSCALING_REQUEST_EXPIRE_TIME_S", "60")

from ray.data import DataContext, Datasource
from ray.data import datasource as ray_datasource
from ray.data.block import BlockMetadata
from ray.exceptions import RayTaskError

from capsfusion_ray.errors import CapsFusionError

NO_PROGRESS_TIMEOUT_S = -1  # off: a long time without any spot node is no failure
# Ray Data appends advice on its own retries, which are off here, to every message.
_RAY_ADVICE = "\nFailed to apply UDF transform"


def data_context() -> DataContext:
    """Ray Data's settings of this process, as every graph of this package needs them."""
    context = DataContext.get_current()
    context.execution_options.preserve_order = False
    context.execution_no_progress_timeout_s = NO_PROGRESS_TIMEOUT_S
    context.raise_original_map_exception = True
    context.enable_progress_bars = False  # progress.py counts captions, from commits …
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # … and Ray's hint about bars helps nobody
    context.print_on_execution_start = False
    return context


@dataclass(frozen=True)
class ReadTask:
    """One task: `read` yields tables. `rows` and `bytes` are None where they are not known."""

    read: Callable[[], Iterable[pa.Table]]
    rows: int | None = None
    bytes: int | None = None


class TaskSource(Datasource):
    """A datasource that runs one Ray read task per ReadTask. `name` is shown in Ray's plans and logs."""

    def __init__(self, name: str, tasks: Sequence[ReadTask]) -> None:
        super().__init__()
        self._name, self._tasks = name, tasks

    def get_name(self) -> str:
        return self._name

    def estimate_inmemory_data_size(self) -> int | None:
        sizes = [task.bytes for task in self._tasks if task.bytes is not None]
        return sum(sizes) if len(sizes) == len(self._tasks) else None

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
    ) -> list[ray_datasource.ReadTask]:
        return [
            ray_datasource.ReadTask(
                task.read, BlockMetadata(task.rows, size_bytes=None, input_files=None, exec_stats=None)
            )
            for task in self._tasks
        ]


@contextmanager
def as_raised() -> Iterator[None]:
    """Raise an error of ours that a task raised as itself, so that the command prints one line; a bug keeps Ray's traceback."""
    try:
        yield
    except RayTaskError as error:
        if not isinstance(error.cause, CapsFusionError):
            raise
        message, *_ = str(error.cause).split(_RAY_ADVICE)
        raise type(error.cause)(message) from None
