"""Features of pixels, and the fusion that weighs them, against numpy and the soft fusion."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lightning_samrefine.fusion_weights import FEATURES, LogLinear
from lightning_samrefine.refine.fusion.features import FeatureMaps, class_scores
from lightning_samrefine.refine.windows import WindowMaps

C, H, W, BINS = 3, 12, 10, 7


def whole(votes: torch.Tensor) -> WindowMaps:
    return WindowMaps.whole(votes, (H, W))


def maps() -> FeatureMaps:
    generator = torch.Generator().manual_seed(0)

    def rand(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator)

    return FeatureMaps(
        probs=rand(C, H, W).mul(4).softmax(dim=0),
        color_ratios=rand(C, BINS) * 3,
        color_bins=torch.randint(BINS, (H, W), generator=generator, dtype=torch.int32),
        region_votes=whole(rand(C, 6, 5)),
    )


def expected(found: FeatureMaps) -> np.ndarray:
    """(F, C, H, W) float64 by numpy."""

    def resized(votes: torch.Tensor) -> np.ndarray:
        rows = (np.arange(H) + 0.5) * votes.shape[1] / H - 0.5
        columns = (np.arange(W) + 0.5) * votes.shape[2] / W - 0.5
        rows, columns = rows.clip(0), columns.clip(0)
        y, x = rows.astype(int), columns.astype(int)
        y1, x1 = (y + 1).clip(max=votes.shape[1] - 1), (x + 1).clip(max=votes.shape[2] - 1)
        fy, fx = (rows - y)[:, None], columns - x
        v = votes.numpy().astype(np.float64)
        above = v[:, y][:, :, x] * (1 - fx) + v[:, y][:, :, x1] * fx
        below = v[:, y1][:, :, x] * (1 - fx) + v[:, y1][:, :, x1] * fx
        return above * (1 - fy) + below * fy

    ratios = found.color_ratios.numpy()[:, found.color_bins.numpy()]
    return np.stack(
        [
            np.log(np.maximum(found.probs.numpy(), 1e-4)),
            np.log(np.maximum(ratios, 1e-2)),
            np.broadcast_to(
                np.log(np.maximum(found.probs.numpy().mean(axis=(1, 2)), 1e-5))[:, None, None],
                found.probs.shape,
            ),
            np.log(resized(found.region_votes.maps(0)) + 0.2),
        ]
    )


def test_features_are_the_logarithms_of_the_evidence():
    found = maps()
    pixels = torch.tensor([0, 7, 55, H * W - 1, 7])
    got = found.at(pixels)
    assert got.shape == (4, C, 5)
    want = expected(found).reshape(4, C, -1)[:, :, pixels.numpy()]
    np.testing.assert_allclose(got.numpy(), want, atol=1e-5)


@pytest.mark.parametrize("features", [FEATURES, ("raw", "color"), ("raw",)])
def test_fused_probabilities_are_the_softmax_of_the_scores(features: tuple[str, ...]):
    found = maps()
    weights = LogLinear(features, (0.7, 1.1, 0.4, 2.0)[: len(features)], (0.5, 0.0, -1.0))
    rows = [FEATURES.index(name) for name in features]
    scores = np.einsum("f,fchw->chw", weights.weights, expected(found)[rows])
    scores += np.array(weights.biases)[:, None, None]
    exp = np.exp(scores - scores.max(axis=0))
    got = found.fuse(weights)
    np.testing.assert_allclose(got.numpy(), exp / exp.sum(axis=0), atol=1e-5)
    pixels = torch.arange(H * W)
    by_pixel = class_scores(weights, found.at(pixels)[rows]).softmax(dim=0)
    np.testing.assert_allclose(by_pixel.numpy(), got.flatten(1).numpy(), atol=1e-5)


def test_preset_weights_are_the_product_of_the_soft_fusion():
    found = maps()
    ratios = found.color_ratios[:, found.color_bins.long()]

    def resized(votes: torch.Tensor) -> torch.Tensor:
        return F.interpolate(votes[None], (H, W), mode="bilinear")[0]

    product = found.probs.clamp(min=1e-4) * ratios.clamp(min=1e-2) ** 1.3
    product *= resized(found.region_votes.maps(0)) + 0.2
    got = found.fuse(LogLinear.preset(FEATURES, C))
    torch.testing.assert_close(got, product / product.sum(dim=0), atol=1e-5, rtol=1e-4)


def test_extreme_evidence_is_finite():
    found = maps()
    zero = FeatureMaps(
        torch.eye(3)[:, :, None].expand(3, 3, W).contiguous(),
        torch.zeros(C, BINS),
        torch.zeros(3, W, dtype=torch.int64),
        whole(torch.zeros(C, 6, 5)),
    )
    assert zero.at(torch.arange(3 * W)).isfinite().all()
    assert found.fuse(LogLinear(FEATURES, (50.0,) * 4, (0.0,) * C)).isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((("color", "raw"), (1.0, 1.0), (0.0,)), "features must be 'raw' and any of"),
        ((("color",), (1.0,), (0.0,)), "features must be 'raw'"),
        (((), (), (0.0,)), "got none"),
        ((("raw", "entropy"), (1.0, 1.0), (0.0,)), "got 'raw', 'entropy'"),
        ((("raw",), (float("nan"),), (0.0,)), "weights must be finite"),
        ((("raw",), (1.0,), (float("inf"),)), "biases must be finite"),
    ],
)
def test_wrong_weights_are_refused(arguments: tuple, message: str):
    with pytest.raises(ValueError, match=message):
        LogLinear(*arguments)


def test_weights_of_other_classes_are_refused():
    with pytest.raises(ValueError, match="weights must be those of 3 classes, got 4"):
        maps().fuse(LogLinear.preset(FEATURES, 4))
