"""The clock: first calls, interleaved rounds, peak memory, compiled graphs."""

from __future__ import annotations

import dataclasses
import os
import statistics
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

Call = Callable[[], object]

MIN_ROUNDS, MAX_ROUNDS = 3, 20
SLOW_SECONDS = 1.0
"""A baseline whose first call takes longer, and compiles nothing, is not called again."""

PEAK_SOURCE = {
    "cuda": "torch.cuda.max_memory_allocated over the inputs",
    "cpu": "highest sum of allocations that torch.profiler sees",
}


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of each timed call, in the order of the rounds."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle call."""
        return statistics.median(self.seconds)

    @property
    def low(self) -> float:
        """The fastest call."""
        return min(self.seconds)

    @property
    def high(self) -> float:
        """The slowest call."""
        return max(self.seconds)


@dataclasses.dataclass(frozen=True)
class FirstCall:
    """A method's first, untimed call on its inputs.

    Attributes:
        seconds: how long it took, compilation included.
        graphs: how many graphs Dynamo compiled in it.
        output: what it returned.
        peak_bytes: the most that a call held at once, its output included.
    """

    seconds: float
    graphs: int
    output: Tensor
    peak_bytes: int


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(call: Call, device: torch.device) -> float:
    """Seconds of one call, its result thrown away."""
    synchronize(device)
    begin = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - begin


def first_call(call: Callable[[], Tensor], device: torch.device) -> FirstCall:
    """Call it for the first time: what that costs, returns and holds."""
    seconds: list[float] = []
    before = _compiled_graphs()

    def clocked() -> Tensor:
        begin = time.perf_counter()
        out = call()
        synchronize(device)
        seconds.append(time.perf_counter() - begin)
        return out

    out, peak = _with_peak_memory(clocked, device)
    graphs = _compiled_graphs() - before
    if graphs:  # compiling holds memory too
        out, peak = _with_peak_memory(call, device)
    return FirstCall(seconds[0], graphs, out, peak)


def _compiled_graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def interleave(
    calls: Mapping[str, Call], device: torch.device, *, rounds: int | None, budget: float
) -> dict[str, Timing]:
    """Time all calls in turn, round after round, so that drift hits all of them alike.

    Each round starts with another call than the one before. Warm the calls up first.

    Args:
        calls: what to time, by name.
        device: where they run.
        rounds: how many; None = as many as fit `budget`, from MIN_ROUNDS to MAX_ROUNDS.
        budget: seconds.
    """
    names = list(calls)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    begin = time.perf_counter()
    for done in range(rounds or MAX_ROUNDS):
        if rounds is None and done >= MIN_ROUNDS and time.perf_counter() - begin > budget:
            break
        turn = done % len(names)
        for name in names[turn:] + names[:turn]:
            seconds[name].append(timed(calls[name], device))
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def _with_peak_memory(call: Callable[[], Tensor], device: torch.device) -> tuple[Tensor, int]:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        out = call()
        torch.cuda.synchronize(device)
        return out, torch.cuda.max_memory_allocated(device) - before
    with _profile([ProfilerActivity.CPU], profile_memory=True) as profiler:
        out = call()
    kineto = profiler.profiler.kineto_results if profiler.profiler is not None else None
    events = [event for event in kineto.events() if event.name() == "[memory]"] if kineto else []
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return out, peak


def write_trace(call: Call, path: str) -> None:
    """One warm call as a Chrome trace: compiled parts and operators, when and for how long."""
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    call()
    with _profile(activities) as profiler:
        call()
    profiler.export_chrome_trace(path)


def _profile(activities: list[ProfilerActivity], profile_memory: bool = False) -> profile:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it reports every start and stop otherwise
    return profile(activities=activities, profile_memory=profile_memory)
