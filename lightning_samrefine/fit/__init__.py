"""A fusion that is fitted to labeled images, beside a control without SAM."""

from lightning_samrefine.fit.features import (
    FEATURES,
    PRESET_WEIGHTS,
    SAM_FEATURES,
    FeatureMaps,
    LogLinear,
)
from lightning_samrefine.fit.sample import ImageSample, PixelSample, assign_folds, priority
from lightning_samrefine.fit.solve import FOLDS, MIN_IMAGES, CrossValidation, cross_validate, fit
from lightning_samrefine.fit.verdict import PixelLabels, Verdict, certain_gain, judge
from lightning_samrefine.fit.weights import FusionWeights, is_fusion_weights

__all__ = [
    "FEATURES",
    "FOLDS",
    "MIN_IMAGES",
    "PRESET_WEIGHTS",
    "SAM_FEATURES",
    "CrossValidation",
    "FeatureMaps",
    "FusionWeights",
    "ImageSample",
    "LogLinear",
    "PixelLabels",
    "PixelSample",
    "Verdict",
    "assign_folds",
    "certain_gain",
    "cross_validate",
    "fit",
    "is_fusion_weights",
    "judge",
    "priority",
]
