"""Seconds and bytes of one call, on the CPU or a GPU."""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def now(device: torch.device) -> float:
    """Return the time once pending work on the device is done.

    One core's time is that which the processor spent on this process: on a machine that others use
    too, it is more telling than the time on the wall.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    one_core = device.type == "cpu" and torch.get_num_threads() == 1
    return time.process_time() if one_core else time.perf_counter()


def seconds(device: torch.device, run: Callable[[], Any]) -> float:
    """Time one call, pending work on the device included."""
    gc.collect()
    start = now(device)
    run()
    return now(device) - start


def peak_bytes(device: torch.device, run: Callable[[], Any]) -> float:
    """Return the growth of memory at the worst moment of a call; NaN where it cannot be read."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    clear, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    if not clear.exists():
        run()
        return float("nan")
    # What earlier calls freed goes back to the system, or it would be used again unseen; then the
    # peak starts again from what is resident.
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    clear.write_text("5")

    def kilobytes(field: str) -> int:
        return int(status.read_text().split(f"{field}:")[1].split()[0])

    before = kilobytes("VmRSS")
    run()
    return (kilobytes("VmHWM") - before) * 1024
