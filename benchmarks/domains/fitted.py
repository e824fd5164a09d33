"""``refine="auto"`` on a pair: fitted on its validation split, then applied to any split."""

from __future__ import annotations

import json
from functools import cache, lru_cache
from pathlib import Path

import torch
from rich.progress import track
from torch import Tensor

from benchmarks.domains.pairs import IGNORED, class_names, examples
from lightning_samrefine import Refiner
from lightning_samrefine.adapters.batch_adapter import RefineInputs
from lightning_samrefine.callbacks.auto_refiner import AutoRefiner
from lightning_samrefine.fit.auto_fusion import AutoFusion, FittedFusion
from lightning_samrefine.refine.results import Refinement


class FittedOnVal:
    """Refines as the callback does after one validation.

    An image of the validation split is refined with the weights of its fold, which were fitted
    without it.

    Args:
        root: The data folder.
        refiner: With the preset ``"auto"``.
        folder: Keeps the fits.
    """

    def __init__(self, root: Path, refiner: Refiner, folder: Path) -> None:
        self._root, self._refiner, self._folder = root, refiner, folder
        self._auto = cache(self._fitted)
        # The labels and the control of an image are taken one after the other.
        self._refine = lru_cache(maxsize=1)(self._refinement)

    def refined(self, pair: str, image: Tensor, probs: Tensor) -> Tensor:
        """Return the labels of the fusion with SAM."""
        return self._refine(pair, image, probs).labels

    def control(self, pair: str, image: Tensor, probs: Tensor) -> Tensor:
        """Return the labels of the fitted fusion without SAM."""
        labels = self._refine(pair, image, probs).control
        assert labels is not None
        return labels

    def found(self, pair: str) -> str:
        """Return what the cross-validation on the validation split found."""
        fitted = self._auto(pair).fitted
        return "too few images" if fitted is None else fitted.final.found

    def _refinement(self, pair: str, image: Tensor, probs: Tensor) -> Refinement:
        refine = AutoRefiner(self._refiner, self._auto(pair), IGNORED)
        (refinement,) = refine(_inputs(image, probs, None))
        return refinement

    def _fitted(self, pair: str) -> AutoFusion:
        path = self._folder / f"{pair.replace(' ', '_').replace(',', '')}.json"
        classes = class_names(self._root, pair)
        if path.exists():
            fitted = FittedFusion.from_mapping(json.loads(path.read_text(encoding="utf-8")))
            return AutoFusion(classes, fitted)
        auto = AutoFusion(classes)
        refiner = AutoRefiner(self._refiner, auto, IGNORED)
        for example in track(examples(self._root, pair, "val"), description=f"fit {pair}"):
            refiner.sample(_inputs(example.image, example.predict(), example.target))
        auto.finish()
        assert auto.fitted is not None, f"{pair} has too few validation images"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(auto.fitted.to_mapping()), encoding="utf-8")
        return auto


@torch.no_grad()
def _inputs(image: Tensor, probs: Tensor, target: Tensor | None) -> RefineInputs:
    return RefineInputs([image], [probs], [probs.argmax(0)], None if target is None else [target])
