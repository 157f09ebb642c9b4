"""What a measurement ran on, for its header."""

from __future__ import annotations

import platform
from pathlib import Path

import torch

from flexdga import __version__


def device_name(device: torch.device) -> str:
    """The GPU's name, or the CPU's model and vector instructions."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_cpu_model()}, {torch.backends.cpu.get_cpu_capability()}"


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def versions() -> str:
    """flexdga, torch and Python."""
    return f"flexdga {__version__}, torch {torch.__version__}, Python {platform.python_version()}"
