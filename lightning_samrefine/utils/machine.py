"""Facts for a bug report: versions, processor and device."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path

import torch

PACKAGES = (
    "lightning-samrefine",
    "torch",
    "torchvision",
    "lightning",
    "torchmetrics",
    "hydra-core",
    "numpy",
    "segment-anything",
    "transformers",
)
_DRIVER_TIMEOUT = 10.0  # seconds; nvidia-smi hangs if a driver does


def default_device() -> torch.device:
    """Return the device of ``Trainer(accelerator="auto")``, among those tested."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def describe_versions() -> dict[str, str]:
    """Return the versions of Python and of every package of `PACKAGES` that is installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    # torch.__version__ includes its build, such as 2.14.1+cu130.
    return {**found, "torch": torch.__version__}


def describe_machine(device: torch.device) -> dict[str, str]:
    """Return the system, the processor with the instructions torch uses, and the device."""
    facts = {
        "system": platform.platform(),
        "CPU": (
            f"{_processor()}, {torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores, "
            f"{torch.get_num_threads()} threads"
        ),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        build = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
        facts["device"] = (
            f"{device}, {properties.name}, {properties.total_memory / 1e9:.0f} GB, compute "
            f"capability {properties.major}.{properties.minor}"
        )
        facts["driver"] = f"{_nvidia_driver()}, torch built for {build}"
        facts["float32 products"] = torch.get_float32_matmul_precision()
    elif device.type == "mps":
        facts["device"] = f"mps, macOS {platform.mac_ver()[0]}"
    else:
        facts["device"] = str(device)
    return facts


def _processor() -> str:
    """Return the processor's name; on Linux it is available in a file only."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _nvidia_driver() -> str:
    command = shutil.which("nvidia-smi")
    if command is None:
        return "unknown (no nvidia-smi)"
    query = [command, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        output = subprocess.run(
            query, capture_output=True, text=True, timeout=_DRIVER_TIMEOUT, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown (nvidia-smi: {type(error).__name__})"
    return output.stdout.strip().splitlines()[0] if output.stdout.strip() else "unknown"
