"""Finding a model's weights, and noticing their changes."""

import pytest
import torch
from torch import nn

from lightning_samrefine.models.fingerprint import all_weights, checksums, stamp


def network():
    shared = nn.Linear(2, 2)
    return nn.Sequential(nn.Linear(3, 2), shared, nn.BatchNorm1d(2), shared, nn.ReLU())


def test_they_are_those_that_torch_finds():
    module = network()
    module.absent = None
    module.register_buffer("empty", None)
    expected = {id(tensor) for tensor in (*module.parameters(), *module.buffers())}
    assert {id(tensor) for tensor in all_weights(module)} == expected


def test_modules_that_hold_one_another_end():
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    first.other, second.other = second, first
    assert len(all_weights(first)) == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_checksums_see_what_is_written_through_data(dtype):
    tensor = torch.arange(12).reshape(3, 4).T.to(dtype)
    before = checksums([tensor])
    assert checksums([tensor.clone()]) == before
    stamped = stamp([tensor])
    tensor.data[2, 1] = tensor.data[2, 1] == 0
    assert stamp([tensor]) == stamped
    assert checksums([tensor]) != before


@pytest.mark.parametrize(
    "change",
    [
        lambda module: module[0].weight.detach().add_(1),
        lambda module: module[2].running_mean.add_(1),
        lambda module: setattr(module[0].weight, "data", torch.ones(2, 3)),
        lambda module: setattr(module[0], "weight", nn.Parameter(torch.ones(2, 3))),
        lambda module: module.__setitem__(0, nn.Linear(3, 2)),
    ],
    ids=["written", "buffer", "data", "parameter", "module"],
)
def test_a_change_shows(change):
    module = network()
    before = stamp(all_weights(module))
    assert stamp(all_weights(module)) == before
    change(module)
    assert stamp(all_weights(module)) != before
