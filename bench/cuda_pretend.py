"""A process that compiles for a GPU that is not there: tensors of its device have no data.

Everything below is global to the process and touches private names of torch 2.13 and triton 3.7:
one process for each architecture, started by `cuda_check.py`, and none of a user's own.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import subprocess
import sysconfig
import tempfile
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple


class Architecture(NamedTuple):
    """What Inductor asks of a device."""

    name: str
    capability: int
    multiprocessors: int
    shared_memory: int
    """Bytes that one block may ask for."""


ARCHITECTURES = {
    "sm_80": Architecture("A100", 80, 108, 166912),
    "sm_90": Architecture("H100", 90, 132, 232448),
    "sm_100": Architecture("B200", 100, 148, 232448),
}


def why_not() -> str | None:
    """What this machine lacks to compile for a GPU that it has not, or None."""
    if importlib.util.find_spec("triton") is None:
        return 'triton is not installed; expected pip install "flexdga[cuda-check]" (Linux)'
    import torch

    if torch.version.cuda is not None:
        return (
            f"this PyTorch is built with CUDA {torch.version.cuda}, whose devices cannot be "
            f"pretended; expected a CPU build of torch"
        )
    return None


def build_shim(folder: str) -> str:
    """Compile `cuda_shim.cpp` into the folder; its path.

    Raises:
        RuntimeError: the compiler is missing or fails.
    """
    target = os.path.join(folder, "cuda_shim" + str(sysconfig.get_config_var("EXT_SUFFIX")))
    torch = _torch_folder()
    source = Path(__file__).with_name("cuda_shim.cpp")
    command = [
        os.environ.get("CXX", "g++"), "-O1", "-std=c++20", "-shared", "-fPIC",
        f"-I{torch}/include", str(source), "-o", target, f"-L{torch}/lib", "-lc10", "-ltorch_cpu",
    ]  # fmt: skip
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise RuntimeError(f"{command[0]}: not found; expected a C++ compiler") from error
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed:\n{done.stderr[-2000:]}")
    return target


def load_shim(path: str) -> None:
    """Load what `build_shim` made; before torch is imported."""
    ctypes.CDLL(f"{_torch_folder()}/lib/libtorch_cpu.so")
    ctypes.CDLL(path)


def _torch_folder() -> str:
    found = importlib.util.find_spec("torch")
    assert found is not None and found.submodule_search_locations
    return found.submodule_search_locations[0]


def pretend(
    architecture: Architecture,
    on_kernel: Callable[[Any], None],
    on_launch: Callable[[], None] = lambda: None,
) -> None:
    """Make torch, Inductor and triton believe in one GPU, in a process that loaded the shim.

    Kernels are compiled to cubin, and never run: `on_kernel` gets Inductor's `CachingAutotuner` of
    each when it is compiled; `on_launch` is called where a kernel would be launched.
    """
    scratch = tempfile.mkdtemp(prefix="flexdga_cuda_")
    os.environ.update(
        TORCHINDUCTOR_CACHE_DIR=f"{scratch}/inductor",
        TRITON_CACHE_DIR=f"{scratch}/triton",
        TORCHINDUCTOR_FORCE_DISABLE_CACHES="1",
        TORCHINDUCTOR_COMPILE_THREADS="1",
    )
    _pretend_device(architecture)
    _pretend_driver(architecture)
    _compile_without_running(on_kernel, on_launch)
    _fold_constants_on_cpu()


def _pretend_device(architecture: Architecture) -> None:
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    major, minor = divmod(architecture.capability, 10)
    properties = types.SimpleNamespace(
        name=architecture.name, major=major, minor=minor, warp_size=32, uuid="none",
        multi_processor_count=architecture.multiprocessors, regs_per_multiprocessor=65536,
        max_threads_per_block=1024, max_threads_per_multi_processor=2048,
        shared_memory_per_block=49152, shared_memory_per_block_optin=architecture.shared_memory,
        shared_memory_per_multiprocessor=architecture.shared_memory + 1024,
        total_memory=80 << 30, L2_cache_size=50 << 20, gcnArchName="", is_integrated=0,
        is_multi_gpu_board=0,
    )  # fmt: skip
    cuda: Any = torch.cuda
    answers = {
        "is_available": True, "device_count": 1, "current_device": 0, "synchronize": None,
        "get_device_properties": properties, "get_device_capability": (major, minor),
        "get_device_name": architecture.name, "is_bf16_supported": True, "is_tf32_supported": True,
        "_lazy_init": None, "_exchange_device": 0, "_maybe_exchange_device": 0, "set_device": None,
    }  # fmt: skip
    for name, answer in answers.items():
        setattr(cuda, name, _answer(answer))
    cuda.random._lazy_init = _answer(None)
    state = torch.empty(16, dtype=torch.uint8)
    cuda.get_rng_state = cuda.random.get_rng_state = _answer(state)
    cuda.set_rng_state = cuda.random.set_rng_state = _answer(None)
    # Or torch.tensor(2.0, device="cuda") would look for the device.
    mode: Any = FakeTensorMode
    mode.avoid_device_init = property(lambda self: True)
    version: Any = torch.version
    version.cuda = "13.0"
    core: Any = torch._C
    core._cuda_getCurrentRawStream = _answer(0)


def _pretend_driver(architecture: Architecture) -> None:
    import torch
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver

    target = GPUTarget("cuda", architecture.capability, 32)

    class Driver:
        get_current_target = staticmethod(_answer(target))
        get_current_device = staticmethod(_answer(0))
        get_active_torch_device = staticmethod(_answer(torch.device("cuda", 0)))
        get_device_interface = staticmethod(_answer(torch.cuda))
        is_active = staticmethod(_answer(True))

    driver.set_active(Driver())


def _compile_without_running(
    on_kernel: Callable[[Any], None], on_launch: Callable[[], None]
) -> None:
    import torch
    from torch._functorch import config as autograd
    from torch._inductor import config as inductor
    from torch._inductor.runtime import triton_helpers, triton_heuristics

    helpers: Any = triton_helpers
    helpers.set_driver_to_gpu = _answer(None)
    inductor.use_static_triton_launcher = False
    inductor.shape_padding = False  # it times matrix products
    autograd.force_non_lazy_backward_lowering = True
    tuner: Any = triton_heuristics.CachingAutotuner

    def precompile(
        self: Any,
        warm_cache_only: bool = False,
        reload_kernel: Any = None,
        static_triton_bundle_key: Any = None,
    ) -> None:
        if reload_kernel is not None:
            self._reload_kernel = reload_kernel
        self.configs = self.configs[:1]  # of block sizes among which a GPU's clock would choose
        self._precompile_worker()
        on_kernel(self)

    tuner.precompile = precompile
    tuner.run = lambda *args, **kwargs: on_launch()

    def empty_strided(size: Any, stride: Any, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty_strided(size, stride, dtype=dtype, device="cuda:0")

    def reinterpret(x: torch.Tensor, size: Any, stride: Any, offset: int = 0) -> torch.Tensor:
        return x.as_strided(size, stride, x.storage_offset() + offset)

    # What is left of the generated code runs, on tensors without data.
    guards: Any = torch._C._dynamo.guards
    guards._empty_strided_cuda = empty_strided
    guards._reinterpret_tensor = reinterpret


def _fold_constants_on_cpu() -> None:
    """Inductor's constant folding computes single numbers, on the device that they are for."""
    import torch
    from torch._inductor.fx_passes import joint_graph
    from torch.utils._python_dispatch import TorchDispatchMode

    def here(x: Any) -> Any:
        return torch.device("cpu") if isinstance(x, torch.device) and x.type == "cuda" else x

    class OnCPU(TorchDispatchMode):
        def __torch_dispatch__(
            self, function: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            named = {key: here(value) for key, value in (kwargs or {}).items()}
            return function(*map(here, args), **named)

    def on_cpu(stock: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with OnCPU():
                return stock(*args, **kwargs)

        return run

    folder: Any = joint_graph.UniformValueConstantFolder
    for name in ("_deduce_value", "_add_peephole_patterns"):
        setattr(folder, name, on_cpu(getattr(folder, name)))


def _answer(value: Any) -> Callable[..., Any]:
    def answer(*args: Any, **kwargs: Any) -> Any:
        return value

    return answer
