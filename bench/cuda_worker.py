"""The process that compiles for one architecture, and says what came of it, a line for each case.

`python -m flexdga_bench.cuda_worker SHIM ARCHITECTURE CASES`: cases as JSON; JSON lines come out.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
import time
from typing import Any

from . import cuda_pretend


@dataclasses.dataclass
class Kernel:
    """What a kernel takes of the machine.

    Attributes:
        name: Inductor's.
        part: `forward` or `backward` of flex_attention, or `other`.
        registers: of a thread; 255 is all that there are.
        spill_bytes: stored outside of registers by a thread, and loaded again.
        shared_bytes: of a block.
        fits: whether the architecture has so much shared memory, and so many threads.
        num_warps: of a block.
        num_stages: of the pipeline of loads.
    """

    name: str
    part: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    fits: bool
    num_warps: int
    num_stages: int


@dataclasses.dataclass
class Outcome:
    """What came of a case.

    Attributes:
        case: what `str` makes of the case.
        kernels: all that were compiled to cubin for it, once each.
        launches: how many kernels one pass of the case launches, without those of ATen.
        calls: what ATen (cuBLAS among it) computes beside them.
        problems: what is wrong; nothing, if all is well.
        seconds: it took.
    """

    case: str
    kernels: list[Kernel]
    launches: int
    calls: list[str]
    problems: list[str]
    seconds: float


class _Recorder:
    """Collects kernels, as they are compiled, and the code that launches them."""

    def __init__(self, architecture: cuda_pretend.Architecture) -> None:
        self.architecture = architecture
        self.kernels: list[Kernel] = []
        self.launches = 0
        self.code: list[str] = []
        self._logs: dict[str, str] = {}  # of ptxas, by the cubin
        self._log = ""

    def install(self) -> None:
        """Listen to ptxas and to Inductor."""
        from torch._inductor.graph import GraphLowering
        from triton import knobs
        from triton.backends.nvidia import compiler

        knobs.nvidia.dump_ptxas_log = True
        module: Any = compiler
        module.print = self._take_log
        lowering: Any = GraphLowering
        lowering.save_output_code = staticmethod(self.code.append)

    def _take_log(self, text: str) -> None:
        self._log = text

    def launch(self) -> None:
        """A kernel would be launched."""
        self.launches += 1

    def add(self, tuner: Any) -> None:
        """An Inductor kernel that was compiled: every variant of it."""
        for result in tuner.compile_results:
            compiled, meta = result.kernel, result.kernel.metadata
            # triton keeps what it compiled before: ptxas speaks once for each.
            log = self._logs.setdefault(compiled.hash, self._log)
            limit = self.architecture.shared_memory
            registers = re.search(r"Used (\d+) registers", log)
            spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
            assert registers and spills, log
            self.kernels.append(
                Kernel(
                    meta.name, _part(meta.name), int(registers[1]),
                    int(spills[1]) + int(spills[2]), meta.shared,
                    meta.shared <= limit and meta.num_warps * 32 <= 1024,
                    meta.num_warps, meta.num_stages,
                )
            )  # fmt: skip


def _part(name: str) -> str:
    if not name.startswith("triton_tem_"):
        return "other"
    return "backward" if "flex_attention_backward" in name else "forward"


def _problems(recorder: _Recorder, attention: bool, backward: bool) -> list[str]:
    problems = []
    for kernel in recorder.kernels:
        if not kernel.fits:
            problems.append(
                f"{kernel.name}: {kernel.shared_bytes} bytes of shared memory, "
                f"{kernel.num_warps} warps; {recorder.architecture.name} has "
                f"{recorder.architecture.shared_memory} bytes and 32 warps"
            )
    found = {kernel.part for kernel in recorder.kernels}
    for part in ["forward"] * attention + ["backward"] * backward:
        if part not in found:
            problems.append(f"no {part} kernel of flex_attention was compiled")
    for code in recorder.code:
        for mark in ("async_compile.cpp", "empty_strided_cpu(", "device='cpu'"):
            if mark in code:
                problems.append(f"part of it would run on the CPU ({mark} in the code)")
    return problems


def _calls(code: list[str]) -> list[str]:
    """ATen's operators in the code that launches kernels."""
    lines = [
        line for text in code for line in text.splitlines() if not line.lstrip().startswith("#")
    ]
    found = re.findall(r"(?:extern_kernels|torch\.ops\.aten)\.(\w+)[\w.]*\(", "\n".join(lines))
    return sorted(set(found))


def main(argv: list[str]) -> int:
    """Compile the cases."""
    shim, name, cases = argv
    cuda_pretend.load_shim(shim)  # before torch
    architecture = cuda_pretend.ARCHITECTURES[name]
    recorder = _Recorder(architecture)
    cuda_pretend.pretend(architecture, recorder.add, recorder.launch)
    recorder.install()

    from torch._subclasses.fake_tensor import FakeTensorMode

    from .cuda_cases import Case, execute

    for fields in json.loads(cases):
        case, begin, problems = Case(**fields), time.perf_counter(), []
        recorder.kernels.clear()
        recorder.code.clear()
        recorder.launches = 0
        try:
            with FakeTensorMode(allow_non_fake_inputs=True):
                execute(case)
        except Exception as error:  # whatever a compiler raises is what this looks for
            problems.append(f"{type(error).__name__}: {str(error)[:2000]}")
        else:
            problems += _problems(recorder, case.program != "decode", case.backward)
        seconds = time.perf_counter() - begin
        outcome = Outcome(
            str(case), recorder.kernels, recorder.launches, _calls(recorder.code), problems, seconds
        )
        print(json.dumps(dataclasses.asdict(outcome)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
