"""Checks that refinement gives the same labels on this machine's device as on its CPU."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_samrefine.callbacks.arguments import check_sam, parse_refine
from lightning_samrefine.config import RefineConfig
from lightning_samrefine.demo.scenes import CLASS_NAMES, make_scene
from lightning_samrefine.models import Promptable, load_sam
from lightning_samrefine.refine.refiner import Refiner
from lightning_samrefine.refine.results import Refinement
from lightning_samrefine.utils.device import synchronize
from lightning_samrefine.utils.machine import default_device, describe_machine, describe_versions
from lightning_samrefine.utils.precision import choose_precision

AGREEMENT = 0.999  # minimum share of pixels with equal labels
IMAGES = 6
SIZE = 256  # pixels a side
_SECONDS = 12.0  # of a model's reference run, after which it stops
_SEED = 4242  # scenes unused in the tiny SAM's training and in the demonstration
_CELL = 16  # pixels; raw predictions are averages over such squares


@dataclass
class ModelCheck:
    """Results of one SAM on the check's images.

    Attributes:
        sam: Name of the model.
        precision: ``"float32"``, ``"bfloat16"`` or ``"float16"``, that of its autocast.
        reason: Reason of this precision.
        images: Number of images refined.
        device_agreement: Share of pixels, in [0, 1], with equal labels on the device and on the
            CPU, both in float32; None if the device is the CPU.
        precision_agreement: The same for the chosen precision and float32, on the device; None if
            the chosen precision is float32.
        cached_agreement: The same for cached and new embeddings.
        changed: Share of pixels, in [0, 1], with labels changed by refinement.
        accepted: Number of regions whose predicted IoU passed the threshold.
        regions: Number of regions.
        cold_seconds: Mean time of a new image, except the first.
        cached_seconds: Mean time of an image with a cached embedding.
        peak_memory: In bytes, None if it could not be measured: on CUDA the peak of allocated
            tensors, on MPS the driver's memory, else the peak of the process.
        failure: Why the model failed the check, None if it passed.
    """

    sam: str
    precision: str
    reason: str
    images: int = 0
    device_agreement: float | None = None
    precision_agreement: float | None = None
    cached_agreement: float | None = None
    changed: float | None = None
    accepted: int = 0
    regions: int = 0
    cold_seconds: float | None = None
    cached_seconds: float | None = None
    peak_memory: int | None = None
    failure: str | None = None


@dataclass(frozen=True)
class CheckResult:
    """The outcome of `check`; as text it is a verdict and a block for a bug report.

    Attributes:
        versions: By package.
        machine: By name, such as ``"CPU"`` and ``"device"``.
        device: Device that SAM ran on.
        models: The tiny SAM, and yours if given.
        seconds: Duration of the check.
    """

    versions: Mapping[str, str]
    machine: Mapping[str, str]
    device: str
    models: Sequence[ModelCheck]
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether every model passed."""
        return all(model.failure is None for model in self.models)

    @property
    def verdict(self) -> str:
        """The outcome in words."""
        if not self.passed:
            reasons = (f"{one.sam}: {one.failure}" for one in self.models if one.failure)
            return f"FAILED on {self.device}. " + "; ".join(reasons)
        if self.device == "cpu":
            return "PASSED on the CPU; no other device was compared"
        return f"PASSED: {self.device} gives the labels of the CPU"

    def report(self) -> str:
        """Return a Markdown block to paste into a bug report."""
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        lines = ["```text", f"verdict: {self.verdict}", f"versions: {versions}"]
        lines += [f"{name}: {fact}" for name, fact in self.machine.items()]
        for model in self.models:
            lines += ["", *_describe(model)]
        return "\n".join([*lines, "", f"took {self.seconds:.0f} s", "```"])

    def __str__(self) -> str:
        return f"{self.verdict}\n\nFor a bug report:\n\n{self.report()}"


def check(
    sam: str | Promptable | None = None,
    checkpoint: str | Path | None = None,
    refine: Mapping[str, Any] | RefineConfig | str = "default",
    precision: str = "auto",
    device: str | torch.device | None = None,
) -> CheckResult:
    """Refine procedural scenes on this machine, and compare the labels of its device and CPU.

    Runs the tiny SAM of the package, and yours if given, in under a minute: a model that is slow on
    the CPU refines fewer images, at least one. A model passes if the labels of at least 99.9% of
    pixels are equal on the device and on the CPU, in the chosen precision and in float32, and with
    cached and new embeddings.

    Args:
        sam: Another model to check: a name for `load_sam`, or a `Promptable`; None for the tiny
            SAM only.
        checkpoint: Its weights, see `load_sam`.
        refine: Thresholds, as for `SAMRefineCallback`; for yours and for the tiny SAM. Thresholds
            of single classes are ignored: the scenes have other classes.
        precision: As for `Refiner`.
        device: Device for SAM; None for CUDA or MPS if available, else the CPU.

    Returns:
        The outcome. An error while a model refines is recorded as a failure, not raised.

    Raises:
        ValueError: An unknown name or precision, a checkpoint without a model, or a device that
            torch cannot use.
        FileNotFoundError: ``checkpoint`` does not exist.
        TypeError: An argument of a wrong type.
    """
    started = time.perf_counter()
    if sam is None and checkpoint is not None:
        raise ValueError(f"checkpoint must be None without a sam, got {str(checkpoint)!r}")
    check_sam("tiny" if sam is None else sam, checkpoint, precision)
    config = replace(parse_refine(refine), classes=None, class_pred_iou_thresh=None)
    place = default_device() if device is None else _usable(device)
    models = [_check_model(load_sam("tiny"), config, precision, place, needs_accepted=True)]
    if sam is not None and (sam != "tiny" or checkpoint is not None):
        theirs = load_sam(sam, checkpoint) if isinstance(sam, str) else sam
        models.append(_check_model(theirs, config, precision, place))
    return CheckResult(
        describe_versions(),
        describe_machine(place),
        str(place),
        models,
        time.perf_counter() - started,
    )


def raw_prediction(labels: Tensor) -> Tensor:
    """Return (C, H, W) float32 probabilities of (H, W) labels, as coarse as a segmenter's.

    Args:
        labels: int64 in [0, C), C the number of classes of the scenes; H and W multiples of 16.
    """
    exact = F.one_hot(labels, len(CLASS_NAMES)).permute(2, 0, 1).float()
    coarse = F.avg_pool2d(exact[None], _CELL)
    return F.interpolate(coarse, labels.shape, mode="bilinear", align_corners=False)[0]


def agreement(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return the share of equal entries in pairs of label maps, in [0, 1]."""
    equal = sum(int((a.cpu() == b.cpu()).sum()) for a, b in zip(found, expected, strict=True))
    return equal / sum(labels.numel() for labels in expected)


def _usable(device: str | torch.device) -> torch.device:
    try:
        return torch.zeros(1, device=device).device
    except (RuntimeError, AssertionError) as error:  # the latter from a torch without CUDA
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"device must be one that torch can use here, got {str(device)!r} ({reason})"
        ) from error


def _check_model(
    sam: Promptable,
    config: RefineConfig,
    precision: str,
    device: torch.device,
    needs_accepted: bool = False,
) -> ModelCheck:
    dtype, reason = choose_precision(precision, device)
    result = ModelCheck(sam.name, str(dtype or torch.float32).removeprefix("torch."), reason)
    home = sam.device
    try:
        _measure(sam, config, precision, device, result)
    except Exception as error:
        # Any error of the machine is a result of the check.
        result.failure = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    else:
        result.failure = _failure(result, device, needs_accepted)
    finally:
        sam.module.to(home)
    return result


def _measure(
    sam: Promptable,
    config: RefineConfig,
    precision: str,
    device: torch.device,
    result: ModelCheck,
) -> None:
    """Refine the images on both devices and in both precisions, and fill ``result``.

    After an error the fields filled so far remain.
    """
    scenes = [make_scene(_SEED, index, SIZE) for index in range(IMAGES)]
    samples = [(scene.image, raw_prediction(scene.labels)) for scene in scenes]
    sam.module.to("cpu")
    reference, _ = _refine_all(Refiner(sam, config, "32"), samples, _SECONDS)
    expected = [one.labels for one in reference]
    samples = samples[: len(reference)]
    result.images = len(samples)

    sam.module.to(device)
    if device.type != "cpu":
        on_device, _ = _refine_all(Refiner(sam, config, "32"), samples)
        found = [one.labels for one in on_device]
        result.device_agreement = agreement(found, expected)
        expected = found

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    refiner = Refiner(sam, config, precision, cache="memory")
    chosen, cold = _refine_all(refiner, samples)
    labels = [one.labels for one in chosen]
    if result.precision != "float32":
        result.precision_agreement = agreement(labels, expected)
    cached, warm = _refine_all(refiner, samples)
    result.cached_agreement = agreement([one.labels for one in cached], labels)
    result.peak_memory = _peak_memory(device)
    result.changed = 1 - agreement(labels, [probs.argmax(dim=0) for _, probs in samples])
    result.regions = sum(len(one.regions) for one in chosen)
    result.accepted = sum(int(one.regions.accepted.sum()) for one in chosen)
    # The first image includes the one-time set-up of the device.
    result.cold_seconds = sum(cold[1:] or cold) / len(cold[1:] or cold)
    result.cached_seconds = sum(warm) / len(warm)


def _refine_all(
    refiner: Refiner, samples: Sequence[tuple[Tensor, Tensor]], seconds: float = float("inf")
) -> tuple[list[Refinement], list[float]]:
    """Refine images until ``seconds`` have passed, at least one; return their times as well."""
    device = refiner.sam.device
    refined: list[Refinement] = []
    times: list[float] = []
    for image, probs in samples:
        inputs = image.to(device), probs.to(device)
        synchronize(device)
        start = time.perf_counter()
        refined.append(refiner(*inputs))
        synchronize(device)
        times.append(time.perf_counter() - start)
        if sum(times) > seconds:
            break
    return refined, times


def _peak_memory(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # Linux counts in KiB


def _failure(result: ModelCheck, device: torch.device, needs_accepted: bool) -> str | None:
    """Return why the check failed, None if it passed."""
    compared = (
        (result.device_agreement, f"on {device} as on the CPU, in float32"),
        (result.precision_agreement, f"in {result.precision} as in float32"),
        (result.cached_agreement, "from cached embeddings as from new ones"),
    )
    wrong = [
        f"labels are equal on {share:.3%} of pixels {what}, {AGREEMENT:.1%} is the least"
        for share, what in compared
        if share is not None and share < AGREEMENT
    ]
    if needs_accepted and not result.accepted and result.changed == 0:
        wrong.append("nothing was refined, so equal labels prove nothing")
    return " and ".join(wrong) or None


def _describe(model: ModelCheck) -> list[str]:
    lines = [
        f"SAM {model.sam}: {'failed' if model.failure else 'passed'}",
        f"  precision: {model.precision}, because {model.reason}",
    ]
    for name, share in (
        ("device and CPU, float32", model.device_agreement),
        (f"{model.precision} and float32", model.precision_agreement),
        ("cached and new", model.cached_agreement),
    ):
        if share is not None:
            lines.append(f"  equal labels, {name}: {share:.4%} of pixels")
    if model.changed is not None:
        lines.append(
            f"  {model.images} images of {SIZE} x {SIZE} pixels, {model.regions} regions, "
            f"{model.accepted} accepted, {model.changed:.2%} of pixels changed"
        )
    if model.cold_seconds is not None and model.cached_seconds is not None:
        peak = "not measured" if model.peak_memory is None else f"{model.peak_memory / 1e9:.2f} GB"
        lines.append(
            f"  seconds an image: {model.cold_seconds:.3f} new, {model.cached_seconds:.3f} cached; "
            f"peak memory: {peak}"
        )
    if model.failure:
        lines.append(f"  failure: {model.failure}")
    return lines
