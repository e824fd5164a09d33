"""A GPU that is not there: tensors that claim to lie on it, computed on the CPU.

`SimulatedDevice` runs code as it would run on ``cuda`` or ``mps``, with real values: a tensor on
the device is a wrapper around a CPU tensor. It refuses what a real device refuses, an operation on
tensors of two devices or a float64 tensor on ``mps``, and records every wait: an operation for
which the CPU has to wait for the device. torch's `FakeTensorMode` does the first, but has no
values, so it ends at the first number that the code depends on.
"""

from __future__ import annotations

import traceback
from collections import Counter
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map_only

PACKAGE = Path(__file__).parents[2] / "lightning_samrefine"

FREE_BYTES = 80 * 10**9

aten = torch.ops.aten
# Their outputs' shapes, or a number on the CPU, depend on values.
_SHAPES_FROM_VALUES = {
    aten.nonzero.default: "nonzero",
    aten.masked_select.default: "masked_select",
    aten.bincount.default: "bincount",
    aten._unique2.default: "unique",
    aten.unique_dim.default: "unique",
    aten.unique_consecutive.default: "unique",
    aten._local_scalar_dense.default: "item",
    aten.equal.default: "equal",
    aten.is_nonzero.default: "item",
    aten.repeat_interleave.Tensor: "repeat_interleave",
}
_PIN = aten._pin_memory.default
_INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}
# What C++ takes any simulated device for: it has a guard that works without a driver.
_GUARDED = torch.device("cuda", 0)
_COPIES = {aten._to_copy.default, aten.copy_.default}


class DeviceTensor(Tensor):
    """A tensor on the simulated device.

    Attributes:
        held: The same tensor on the CPU.
        claimed: The device that it claims to lie on.
    """

    held: Tensor
    claimed: torch.device

    @staticmethod
    def __new__(cls, held: Tensor, device: torch.device) -> DeviceTensor:
        # As `FakeTensor` does it: a tensor without storage that answers for its device itself, or
        # torch would look for the driver.
        with no_dispatch():
            shape = torch.empty_strided(held.shape, held.stride(), dtype=held.dtype, device="meta")
            return Tensor._make_subclass(
                cls, shape, False, dispatch_device=True, device_for_backend_keys=_GUARDED
            )

    def __init__(self, held: Tensor, device: torch.device) -> None:
        self.held, self.claimed = held, device

    def __repr__(self) -> str:
        return f"DeviceTensor({self.held!r}, device={self.device})"

    @property
    def device(self) -> torch.device:
        return self.claimed

    def tolist(self) -> list:
        return self.cpu().tolist()  # torch's own refuses subclasses

    def numpy(self, *_, **__) -> None:
        raise TypeError(f"can't convert {self.device} device type tensor to numpy")

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.prim.device.default:
            return _GUARDED
        raise RuntimeError(f"{func}: a tensor of a simulated device outside its SimulatedDevice")


class MixedDevicesError(RuntimeError):
    """An operation on tensors of two devices, or on one that the device has not."""


class SimulatedDevice(TorchDispatchMode):
    """Computes on a device that is not there, and counts what the CPU would wait for.

    Args:
        name: ``"cuda"`` or ``"mps"``.

    Attributes:
        waits: Number of waits by kind and by the function of the package that caused it.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self.device = torch.device(name, 0)
        torch._C._ensureCUDADeviceGuardSet()  # without a driver: a guard that does nothing
        self.waits: Counter[tuple[str, str]] = Counter()

    def __enter__(self) -> SimulatedDevice:
        # Factories with ``device="cuda"`` look for a driver first.
        simulation = self

        class Event:
            def record(self, stream: object = None) -> None: ...

            def synchronize(self) -> None:
                simulation._wait("event")

        self._patches = patch.multiple(
            torch.cuda,
            _lazy_init=lambda: None,
            Event=Event,
            current_stream=lambda device=None: None,
            mem_get_info=lambda device=None: (FREE_BYTES, FREE_BYTES),
            memory_reserved=lambda device=None: 0,
            memory_allocated=lambda device=None: 0,
            synchronize=lambda device=None: simulation._wait("synchronize"),
            get_rng_state=lambda device=None: torch.get_rng_state(),
            set_rng_state=lambda state, device=None: None,
            get_device_capability=lambda device=None: (9, 0),
        )
        self._patches.start()
        waits = {"synchronize": lambda: simulation._wait("synchronize")}
        self._of_mps = patch.multiple(torch.mps, **waits)
        self._of_mps.start()
        # torch.tensor makes its tensor on the device below the dispatcher.
        make = torch.tensor
        self._tensor = patch.object(
            torch, "tensor", lambda data, device=None, **named: make(data, **named).to(device)
        )
        self._tensor.start()
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self._patches.stop()
        self._of_mps.stop()
        self._tensor.stop()

    def to_device(self, value: Any) -> Any:
        """Wrap a tensor, or all of a module's, without counting a wait."""
        if isinstance(value, torch.nn.Module):
            for module in value.modules():
                for owned in (module._parameters, module._buffers):
                    for name, tensor in owned.items():
                        if tensor is None or isinstance(tensor, DeviceTensor):
                            continue
                        wrapped = DeviceTensor(tensor.detach(), self.device)
                        if owned is module._parameters:
                            wrapped = torch.nn.Parameter(wrapped, requires_grad=False)
                        owned[name] = wrapped
            return value
        return DeviceTensor(value, self.device)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.ops.prim.device.default and isinstance(args[0], DeviceTensor):
            return _GUARDED
        flat, _ = tree_flatten((args, kwargs))
        on_device = [value for value in flat if isinstance(value, DeviceTensor)]
        on_cpu = [
            value
            for value in flat
            if isinstance(value, Tensor) and not isinstance(value, DeviceTensor)
        ]
        target = kwargs.get("device")
        target = None if target is None else torch.device(target)
        if func is _PIN:  # takes a driver
            return args[0].clone()
        if func in _COPIES:
            return self._copy(func, args, kwargs, target)
        kwargs.pop("pin_memory", None)
        if not on_device and (target is None or target.type == "cpu"):
            return func(*args, **kwargs)

        if on_device and func not in _INDEXING and any(t.dim() > 0 for t in on_cpu):
            raise MixedDevicesError(f"{func}: tensors on {self.device} and on the CPU")
        if func in _SHAPES_FROM_VALUES:
            self._wait(_SHAPES_FROM_VALUES[func])
        if func in _INDEXING:
            self._index(func, args)
        if target is not None:
            kwargs["device"] = torch.device("cpu")
        real_args, real_kwargs = tree_map_only(DeviceTensor, lambda t: t.held, (args, kwargs))
        out = func(*real_args, **real_kwargs)
        wrapped = tree_map_only(Tensor, self._wrap, out)
        if on_device and isinstance(func, torch._ops.OpOverload):
            return return_and_correct_aliasing(func, args, kwargs, wrapped)
        return wrapped

    def _wrap(self, real: Tensor) -> DeviceTensor:
        if self.device.type == "mps" and real.dtype in (torch.float64, torch.complex128):
            raise MixedDevicesError(f"{real.dtype}: mps has no such tensors")
        return DeviceTensor(real, self.device)

    def _copy(self, func, args, kwargs, target):
        non_blocking = bool(kwargs.get("non_blocking", False))
        if func is aten.copy_.default:
            destination, source = args[0], args[1]
            if len(args) > 2:
                non_blocking = bool(args[2])
            here, there = isinstance(source, DeviceTensor), isinstance(destination, DeviceTensor)
            self._transfer(here, there, non_blocking)
            real = [t.held if isinstance(t, DeviceTensor) else t for t in (destination, source)]
            func(*real)
            return destination
        source = args[0]
        here = isinstance(source, DeviceTensor)
        there = here if target is None else target.type != "cpu"
        self._transfer(here, there, non_blocking)
        if target is not None:
            kwargs["device"] = torch.device("cpu")
        kwargs.pop("non_blocking", None)
        out = func(source.held if here else source, **kwargs)
        if out is (source.held if here else source):
            out = out.clone()
        return self._wrap(out) if there else out

    def _transfer(self, from_device: bool, to_device: bool, non_blocking: bool) -> None:
        if from_device and not to_device and not non_blocking:
            self._wait("download")
        if to_device and not from_device and not non_blocking:
            self._wait("upload")

    def _index(self, func, args) -> None:
        indices = [index for index in args[1] if isinstance(index, Tensor)]
        scalar_mask = func is not aten.index.Tensor and args[2].numel() == 1
        for index in indices:
            if index.dtype in (torch.bool, torch.uint8) and not scalar_mask:
                self._wait("boolean index")
            if not isinstance(index, DeviceTensor) and isinstance(args[0], DeviceTensor):
                self._wait("upload")

    def _wait(self, kind: str) -> None:
        self.waits[kind, _caller()] += 1


def _caller() -> str:
    """Return the package's innermost function on the stack, past those that only transfer."""
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        if PACKAGE in path.parents and path != PACKAGE / "utils" / "device.py":
            return f"{path.relative_to(PACKAGE).as_posix()} {frame.name}"
    return "outside the package"
