"""Chooses the autocast for SAM, independent of the precision of the user's run."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

PRECISIONS = ("auto", "32", "bf16-mixed", "16-mixed")


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """Return the type of `choose_precision`, None for no autocast."""
    return choose_precision(precision, device)[0]


def choose_precision(precision: str, device: torch.device) -> tuple[torch.dtype | None, str]:
    """Choose the autocast type for a device, and give the reason in words.

    ``"auto"`` is bf16 on hardware with bf16 arithmetic, fp16 on other CUDA devices, and float32
    elsewhere: a CPU without bf16 instructions emulates them, 5 to 100 times slower than float32.

    Args:
        precision: One of `PRECISIONS`.
        device: The device SAM runs on.

    Returns:
        The autocast type, None for no autocast; and the reason.

    Raises:
        ValueError: An unknown precision.
    """
    if precision not in PRECISIONS:
        raise ValueError(
            f"precision must be one of {', '.join(map(repr, PRECISIONS))}, got {precision!r}"
        )
    if precision != "auto":
        dtypes = {"32": None, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
        return dtypes[precision], f"precision={precision} was set"
    if device.type == "cuda":
        # torch.cuda.is_bf16_supported checks the current device, which may be another one.
        if torch.version.hip or torch.cuda.get_device_capability(device) >= (8, 0):
            return torch.bfloat16, "the GPU computes in bf16"
        return torch.float16, "the GPU has no bf16 arithmetic, but fp16"
    if device.type == "cpu":
        if _cpu_has_bf16():
            return torch.bfloat16, "the CPU has bf16 instructions"
        return None, "the CPU has no bf16 instructions, or torch is too old to detect them"
    return None, f"bf16 is chosen on CUDA and CPUs only, not on {device.type}"


def autocast(dtype: torch.dtype | None, device: torch.device) -> AbstractContextManager[None]:
    """Enter autocast to ``dtype``; None switches off an enclosing autocast."""
    if dtype is None:
        return torch.autocast(device.type, enabled=False)
    return torch.autocast(device.type, dtype=dtype)


def active_autocast(device: torch.device) -> torch.dtype | None:
    """Return the dtype of the autocast in effect on a device, None without one."""
    if not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def rounded(value: Any, dtype: torch.dtype | None) -> Any:
    """Round floats to the precision of ``dtype``, keeping their own dtype.

    Args:
        value: A tensor or a tuple of tensors; anything else is returned unchanged.
        dtype: Dtype of the autocast it was computed under; None returns it unchanged.
    """
    if dtype is None:
        return value
    if isinstance(value, Tensor):
        return value.to(dtype).to(value.dtype) if value.is_floating_point() else value
    if type(value) is tuple and all(isinstance(part, Tensor) for part in value):
        return tuple(rounded(part, dtype) for part in value)
    return value


def _cpu_has_bf16() -> bool:
    # get_capabilities is missing in the oldest supported torch; without it float32 is safe.
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
