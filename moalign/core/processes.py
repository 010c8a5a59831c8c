"""Several processes that train one run, as ``accelerate launch -m moalign train ...`` or ``torchrun`` start them.

All go through the same program. A step's rows are shared among them, what each has sampled and scored is exchanged, so
that all go on from the same numbers, and their gradients are added before each update: a step is that of one process,
up to rounding. One process, the writer, keeps the run.

No library knows of the others: the launcher's variables are taken out of the environment, so that trl, transformers
and accelerate train as they do alone, on the one GPU that the process is left with. (Their wrappers add up gradients in
hooks of the model's ``forward``; we read hidden states past it.) All that is exchanged goes through the CPU, by gloo:
tokens, and gradients of adapters, which are small beside a step.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from moalign.core.errors import MoalignError, RequestError, WorkError

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

_SET = "RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE GROUP_ ROLE_ MASTER_ TORCHELASTIC_ ACCELERATE_ FSDP_"
VARIABLES = tuple(_SET.split())
"""What the names of the variables that launchers set begin with."""
SHARDED = {"ACCELERATE_USE_FSDP": "FSDP", "ACCELERATE_USE_DEEPSPEED": "DeepSpeed"}
SHARDED |= {"ACCELERATE_USE_MEGATRON_LM": "Megatron-LM", "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism config"}
"""Variables with which accelerate asks for a model that is spread over processes, and what they stand for."""

JOINING, WORKING = timedelta(minutes=10), timedelta(days=2)
"""How long processes wait for each other: at first, and later, while one makes what all need."""
TOGETHER = 3.0
"""Seconds in which processes that refuse the same request come to do so."""


@dataclass(frozen=True)
class _Group:
    rank: int
    count: int
    store: Any
    """Of keys and values, which all of them read and write; it outlives a process."""


_group: _Group | None = None


def count() -> int:
    """Return how many processes train together."""
    return 1 if _group is None else _group.count


def rank() -> int:
    """Return the number of this process among them, from 0."""
    return 0 if _group is None else _group.rank


def is_writer() -> bool:
    """Whether this process keeps the run: its record, log, checkpoints and weights."""
    return rank() == 0


def launched() -> tuple[int, int]:
    """Return (rank, count) as a launcher has set them, also before :func:`joined`; (0, 1) without one."""
    if _group is not None:
        return _group.rank, _group.count
    given = [os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE")]
    return (int(given[0]), int(given[1])) if all(text.isdecimal() for text in given) else (0, 1)


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Within the block the processes that a launcher has started work together; without one there is nothing to do.

    Raises RequestError when the launcher asks for what there is not; WorkError when the processes do not meet.
    """
    global _group
    if _group is not None or "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        yield
        return
    _group = _join(*launched())
    yield  # an error leaves the group as it is, for first_to_end()
    if _group is not None:
        import torch.distributed

        torch.distributed.destroy_process_group()
        _group = None


def _join(rank: int, count: int) -> _Group | None:
    sharded = [what for name, what in SHARDED.items() if os.environ.get(name, "").lower() in ("1", "true")]
    if sharded:
        raise RequestError(
            f"accelerate launch asks for {sharded[0]}, which spreads a model over processes; here each process holds "
            "the whole base, and adapters are all that is trained: leave it out (accelerate launch --multi_gpu), and "
            "let policy.load_in_4bit or policy.gradient_checkpointing save memory"
        )
    if count > 1:
        import torch
        from torch.distributed.rendezvous import rendezvous

        _keep_one_gpu(int(os.environ.get("LOCAL_RANK", rank)))
        try:
            store, *_ = next(rendezvous("env://", timeout=JOINING))
            torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=count, timeout=WORKING)
        except (ValueError, RuntimeError) as error:
            raise WorkError(f"process {rank} of {count} does not reach the others: {_line(error)}") from error
    for name in [name for name in os.environ if name.startswith(VARIABLES)]:
        del os.environ[name]
    return _Group(rank, count, store) if count > 1 else None


def _keep_one_gpu(local_rank: int) -> None:
    """Leave this process one of the GPUs that it sees: libraries that see several use them all."""
    import torch

    seen = torch.cuda.device_count()
    if seen < 2:
        return
    names = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(seen)))
    os.environ["CUDA_VISIBLE_DEVICES"] = names.split(",")[local_rank % seen]
    # What was begun before does not change; torch.cuda.is_available() is enough to begin.
    if torch.cuda.is_initialized() or torch._C._cuda_getDeviceCount() != 1:  # type: ignore[no-untyped-call]
        raise RequestError("CUDA is in use before the processes were joined; call moalign before anything uses a GPU")


# -- exchange --------------------------------------------------------------------------------------------------------


def share(rows: T) -> T:
    """Return this process's part of rows (list, array or tensor); those of all, by rank, are all rows."""
    every: Any = rows
    size, own, of = len(every), rank(), count()
    part: T = every[size * own // of : size * (own + 1) // of]
    return part


def gather(value: T) -> list[T]:
    """Return what each process gives, by rank; tensors must be on the CPU."""
    if _group is None:
        return [value]
    import torch.distributed

    values: list[Any] = [None] * _group.count
    with _exchange():
        torch.distributed.all_gather_object(values, value)
    return values


def gather_rows(tensor: Tensor) -> Tensor:
    """Return the rows of all processes one after another, on this one's device; they agree in all but their number."""
    if _group is None:
        return tensor
    import torch

    return torch.cat(gather(tensor.cpu())).to(tensor.device)


def agree(value: T) -> T:
    """Return what the writer gives."""
    if _group is None:
        return value
    import torch.distributed

    values = [value if is_writer() else None]
    with _exchange():
        torch.distributed.broadcast_object_list(values, src=0)
    given: Any = values[0]
    return given  # type: ignore[no-any-return]


def barrier() -> None:
    """Wait until every process is here."""
    gather(None)


def add_gradients(parameters: Sequence[Tensor]) -> None:
    """Make every process's gradients the sum of all processes'; one that none has stays None."""
    if _group is None:
        return
    import torch

    there = torch.tensor([float(p.grad is not None) for p in parameters])
    flat = [torch.zeros(p.numel()) if p.grad is None else p.grad.detach().float().cpu().reshape(-1) for p in parameters]
    total = torch.cat([there, *flat])
    with _exchange():
        torch.distributed.all_reduce(total)
    there, *sums = torch.split(total, [len(parameters), *(p.numel() for p in parameters)])
    for parameter, own, known in zip(parameters, sums, there.tolist(), strict=True):
        parameter.grad = own.reshape(parameter.shape).to(parameter) if known else None


def added(metrics: Mapping[str, float], parameters: Sequence[Tensor]) -> dict[str, float]:
    """Return the sums of all processes' metrics by name, and add up their gradients."""
    add_gradients(parameters)
    sums: dict[str, float] = {}
    for own in gather(dict(metrics)):
        for name, value in own.items():
            sums[name] = sums[name] + value if name in sums else value
    return sums


# -- endings ---------------------------------------------------------------------------------------------------------

_ENDED, _WHY = "moalign/ended", "moalign/why"


@contextlib.contextmanager
def _exchange() -> Iterator[None]:
    """Turn the loss of a process into the error that ended it, or that of a process that ended without a word."""
    try:
        yield
    except RuntimeError as error:
        raise _why() or WorkError(
            "another process of this training is gone (killed, or its machine is); the same command goes on from the "
            f"last checkpoint, with as many processes or fewer ({_line(error)})"
        ) from error


def _why() -> MoalignError | None:
    """Return the error that the first process to end has left."""
    with contextlib.suppress(RuntimeError):
        if _group is not None and _group.store.check([_WHY]):
            code, text = json.loads(_group.store.get(_WHY))
            return RequestError(*text) if code == RequestError.exit_code else WorkError(*text)
    return None


def first_to_end(error: BaseException) -> bool:
    """Whether this process is the first that ``error`` (or another one) ends, and so has to say why.

    The others learn the error. A wrong request is refused by all processes, each of which waits here for the others: a
    launcher kills those that are left when one has ended.
    """
    if _group is None:
        return launched()[0] == 0
    store, first = _group.store, True
    with contextlib.suppress(RuntimeError):  # the store is gone with the process that kept it
        first = store.add(_ENDED, 1) == 1
        if first and isinstance(error, Exception):
            code = error.exit_code if isinstance(error, MoalignError) else 1
            texts = error.problems if isinstance(error, RequestError) else [str(error) or type(error).__name__]
            store.set(_WHY, json.dumps([code, list(texts)]))
        last = time.monotonic() + TOGETHER
        while isinstance(error, RequestError) and store.add(_ENDED, 0) < _group.count and time.monotonic() < last:
            time.sleep(0.02)
    return first


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if len(text) < 200 else f"{text[:200]}..."
