"""A run as those processes of a training have it that do not keep it: a copy of their own, gone with the process."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moalign.core import processes
from moalign.core.errors import WorkError
from moalign.runs import record as records
from moalign.runs.checkpoint import Checkpoint
from moalign.runs.meter import Meter
from moalign.runs.record import RunRecord
from moalign.runs.run import CHECKPOINTS, LOCK, OWNER, Run

if TYPE_CHECKING:
    import torch


class Shadow(Run):
    """Everything may be written to it as to the run itself; checkpoints are read there, and written there alone."""

    def __init__(self, path: Path, record: RunRecord, run: Run) -> None:
        """The copy of ``run`` lies in ``path``."""
        super().__init__(path, record)
        self._run = run

    @classmethod
    @contextlib.contextmanager
    def of(cls, run: Run) -> Iterator[Shadow]:
        """Give a copy of ``run`` as it lies on the disk; it is removed when the block ends.

        Raises WorkError when the run is not there: the processes share no folder.
        """
        if not run.path.is_dir():
            raise WorkError(f"{run.path}: not there for process {processes.rank()}; all need the same results folder")
        with tempfile.TemporaryDirectory(prefix="moalign-") as folder:
            path = Path(folder) / run.run_id
            shutil.copytree(run.path, path, ignore=shutil.ignore_patterns(CHECKPOINTS, LOCK, OWNER))
            yield cls(path, records.read(path), run)

    def save_checkpoint(
        self, phase: str, step: int, tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any]
    ) -> None:
        """Do nothing: the writer saves the same."""

    def load_checkpoint(self, phase: str) -> Checkpoint | None:
        """See :meth:`Run.load_checkpoint`."""
        return self._run.load_checkpoint(phase)


@contextlib.contextmanager
def held(run: Run, wait: bool = False) -> Iterator[tuple[Run, Meter | None]]:
    """Hold a run while it is trained; yields what this process trains, and its meter (None: it is done already).

    See :meth:`Run.training`. Of several processes the writer holds the run and the others train shadows of it; they
    leave the block together.
    """
    if processes.is_writer():
        with run.training(wait) as meter:
            processes.barrier()  # nothing changes it now
            processes.barrier()  # the others have their copies
            yield run, meter
    else:
        processes.barrier()
        with Shadow.of(run) as shadow:
            processes.barrier()
            with shadow.training() as meter:
                yield shadow, meter
    processes.barrier()
