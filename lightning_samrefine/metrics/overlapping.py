"""The comparison of overlapping classes: a binary one for each, put together in one result."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import fields, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_samrefine.metrics.calibration import Calibration, RegionScores
from lightning_samrefine.metrics.comparison import (
    SIDES,
    ComparisonResult,
    ImageComparison,
    RefinementComparison,
)
from lightning_samrefine.metrics.counts import RefinementCounts
from lightning_samrefine.metrics.per_image import ImageTotals
from lightning_samrefine.refine.results import Regions


class OverlappingComparison(nn.Module):
    """Counts what `RefinementComparison` counts, for each class as a binary map of its own.

    mIoU is the mean of the classes' IoUs, that of torchmetrics' ``MultilabelJaccardIndex``; bands,
    borders and changed pixels are those of each class's map. The classes' binary matrices stand in
    one of (C + 1, C + 1), whose last row and column are "not of the class".

    Args:
        num_classes: C.
        ignore_index: Target value that is not counted, or None.
        class_names: C names for the per-class figures; "0", "1", … if None.
        trimap_width: As for `RefinementComparison`.

    Attributes:
        counts: As of `RefinementComparison`.
        ignore_index: None: no class is ignored.
    """

    ignore_index: int | None = None

    def __init__(
        self,
        num_classes: int,
        ignore_index: int | None = None,
        class_names: Sequence[str] | None = None,
        trimap_width: int = 3,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.class_names = list(class_names or map(str, range(num_classes)))
        self.classes = nn.ModuleList(
            RefinementComparison(2, ignore_index, trimap_width=trimap_width)
            for _ in range(num_classes)
        )
        self.images = ImageTotals(num_classes)
        self.counts = RefinementCounts()

    def update(
        self,
        raw: Tensor,
        refined: Tensor,
        target: Tensor,
        regions: Regions | None = None,
        control: Tensor | None = None,
        part: tuple[int, int] = (0, 1),
    ) -> list[ImageComparison]:
        """Add the binary map of one class of an image; the classes come in their order.

        Args:
            raw: (H, W) integer, 0 and 1.
            refined: (H, W) integer, 0 and 1.
            target: (H, W) integer, 0, 1 and the ignored value.
            regions: The prompted regions.
            control: (H, W) integer, the labels refined without SAM.
            part: Index and number of the parts of one image: C, or C for each slice of a volume.

        Returns one entry, whose matrices are (C + 1, C + 1).
        """
        index = part[0] % self.num_classes
        own = self._comparison(index)
        (found,) = own.update(raw, refined, target, regions, control)
        matrices = [self._placed(matrix, index) for matrix in found.matrices]
        self.images.update(matrices[0], matrices[1], part)
        return [replace(found, matrices=(matrices[0], matrices[1]))]

    def result(self) -> ComparisonResult:
        """Sum over all processes. A collective call: every process must make it."""
        found = [self._comparison(index).result() for index in range(self.num_classes)]
        calibrations = [
            own.calibration.compute() for own in map(self._comparison, range(len(found)))
        ]
        return ComparisonResult(
            class_names=tuple(self.class_names),
            ignore_index=self.ignore_index,
            trimap_width=found[0].trimap_width,
            widths=found[0].widths,
            matrices={
                side: _sum(self._placed(one.matrices[side], i) for i, one in enumerate(found))
                for side in SIDES
            },
            borders={
                side: torch.stack([one.borders[side][:, 1] for one in found], dim=1)
                for side in SIDES
            },
            changes=torch.stack([one.changes.sum(dim=1) for one in found], dim=1),
            totals=self.images.compute(),
            calibration=Calibration.of(
                **{key: _sum(one[key] for one in calibrations) for key in calibrations[0]}
            ),
            counts=tuple(self.counts.compute().tolist()),
            control=_sum(self._placed(one.control, i) for i, one in enumerate(found)),
        )

    def _comparison(self, index: int) -> RefinementComparison:
        return cast(RefinementComparison, self.classes[index])

    def _placed(self, matrix: Tensor, index: int) -> Tensor:
        """Put a class's (…, 2, 3) matrix into one of all classes, (…, C + 1, C + 1)."""
        size = self.num_classes + 1
        placed = matrix.new_zeros(*matrix.shape[:-2], size, size)
        for row, own_row in enumerate((-1, index)):
            placed[..., own_row, index] = matrix[..., row, 1]
            placed[..., own_row, -1] = matrix[..., row, 0] + matrix[..., row, 2]
        return placed


def _sum(tensors: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(tensors)).sum(dim=0)


def foreground(
    regions: Regions, found: ImageComparison, index: int
) -> tuple[Regions, ImageComparison]:
    """Keep the regions of one class, and give them the class's index among all.

    Args:
        regions: N regions of classes 0 and 1 of a binary map.
        found: What the comparison returned.
        index: The class's among all.
    """
    kept = regions.classes == 1
    values: dict[str, Any] = {
        field.name: value[kept.to(value.device)]
        for field in fields(regions)
        if isinstance(value := getattr(regions, field.name), Tensor)
    }
    values["classes"] = torch.full_like(values["classes"], index)
    shown = replace(regions, **values)
    if found.scores is None or found.region_changes is None:
        return shown, found
    scores = RegionScores(
        *(getattr(found.scores, field.name)[kept] for field in fields(found.scores))
    )
    return shown, replace(found, scores=scores, region_changes=found.region_changes[kept])
