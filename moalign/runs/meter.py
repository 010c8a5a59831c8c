"""The meter: what training costs, counted in the same units for every method."""

from __future__ import annotations

import contextlib
import resource
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Meter:
    """Counts tokens, reward calls and seconds, and knows the peak memory.

    Save :meth:`state` with every checkpoint and give it to :meth:`load` on resume: the totals are then those of the
    work that is in the result. Work lost to a kill (after the last checkpoint) is not counted twice.
    """

    def __init__(self) -> None:
        self.tokens_generated = self.tokens_trained = self.reward_calls = 0
        self._earlier_seconds = 0.0
        self._earlier_peak = 0
        self._started = time.monotonic()

    def add_tokens_generated(self, count: int) -> None:
        """Count response tokens sampled from a policy (padding excluded)."""
        self.tokens_generated += _checked(count)

    def add_tokens_trained(self, count: int) -> None:
        """Count tokens of sequences that a gradient step read (prompt and response, padding excluded)."""
        self.tokens_trained += _checked(count)

    def add_reward_calls(self, count: int) -> None:
        """Count requested scores: responses x objectives."""
        self.reward_calls += _checked(count)

    def add_earlier(self, seconds: float, peak_memory_bytes: int) -> None:
        """Count work that is in the result and was done before this clock began; of the peaks the larger counts."""
        self._earlier_seconds += seconds
        self._earlier_peak = max(self._earlier_peak, peak_memory_bytes)

    def add_run(self, cost: Mapping[str, float], seconds: float, passed: float = 0.0) -> None:
        """Count another run's whole cost (its :meth:`cost`, its seconds) as this one's; of the peaks the larger counts.

        ``seconds`` replaces the seconds that ``passed`` on this clock while that run was found, trained or waited for.
        """
        self.add_tokens_generated(int(cost["tokens_generated"]))
        self.add_tokens_trained(int(cost["tokens_trained"]))
        self.add_reward_calls(int(cost["reward_calls"]))
        self.add_earlier(seconds - passed, int(cost["peak_memory_bytes"]))

    @property
    def seconds(self) -> float:
        """Wall-clock seconds since the meter was made, plus those of the state loaded into it."""
        return self._earlier_seconds + time.monotonic() - self._started

    @property
    def peak_memory_bytes(self) -> int:
        """Peak GPU memory when this process used CUDA, else the process's peak resident memory; in bytes.

        The maximum with the loaded state's. It belongs to the process: what ran in it before is included.
        """
        return max(self._earlier_peak, device_peak_bytes() or process_peak_bytes())

    def cost(self) -> dict[str, int]:
        """Return the record's ``cost`` section."""
        names = ("tokens_generated", "tokens_trained", "reward_calls", "peak_memory_bytes")
        return {name: getattr(self, name) for name in names}

    def state(self) -> dict[str, float]:
        """Return the totals as plain numbers, for a checkpoint."""
        return {**self.cost(), "seconds": self.seconds}

    def load(self, state: Mapping[str, float]) -> None:
        """Continue from a state: counts are replaced, seconds and peak memory continue from it."""
        self.tokens_generated = int(state["tokens_generated"])
        self.tokens_trained = int(state["tokens_trained"])
        self.reward_calls = int(state["reward_calls"])
        self._earlier_seconds = float(state["seconds"])
        self._earlier_peak = int(state["peak_memory_bytes"])


def _checked(count: int) -> int:
    if count < 0:
        raise ValueError(f"a meter counts upwards; found {count}")
    return int(count)


def process_peak_bytes() -> int:
    """Return the peak resident memory of this process in bytes."""
    # ru_maxrss survives exec: a child of an 800 MB process reports 800 MB. VmHWM is of this program alone.
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux kibibytes


def device_peak_bytes() -> int:
    """Return the most memory that torch allocated on one GPU in this process; 0 when CUDA was not used."""
    cuda = _cuda()
    return 0 if cuda is None else max(int(cuda.max_memory_allocated(index)) for index in range(cuda.device_count()))


def fresh_peak() -> None:
    """Let the peaks count from what is in memory now, so that what ran in this process before is not included.

    Works on Linux and for CUDA; elsewhere a peak includes what was before.
    """
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    fresh_device_peak()


def fresh_device_peak() -> None:
    """The same of the GPUs alone."""
    cuda = _cuda()
    for index in range(0 if cuda is None else cuda.device_count()):
        cuda.reset_peak_memory_stats(index)


def _cuda() -> Any:
    """Return torch's module of GPUs when this process has used one; None otherwise."""
    torch = sys.modules.get("torch")
    used = torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized()
    return torch.cuda if torch is not None and used else None
