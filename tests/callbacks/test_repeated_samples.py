"""Repeated samples of a distributed sampler, against the sampler's own indices."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, TensorDataset

from lightning_samrefine.callbacks.repeated_samples import RealSamples


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("batch_size", [1, 2, 3])
@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
@pytest.mark.parametrize("size", [1, 4, 5, 6, 11])
def test_every_sample_counts_once(size, ranks, batch_size, drop_last, shuffle):
    if size < ranks:
        drop_last = False  # torch's sampler could not be iterated
    dataset = TensorDataset(torch.arange(size))
    counted = []
    for rank in range(ranks):
        sampler = DistributedSampler(dataset, ranks, rank, shuffle=shuffle, drop_last=drop_last)
        loader = DataLoader(dataset, batch_size=batch_size, sampler=sampler)
        samples = RealSamples(loader)
        for (batch,) in loader:
            counted += batch[: samples.take(len(batch))].tolist()
    expected = size - size % ranks if drop_last else size
    assert len(counted) == len(set(counted)) == expected


def test_a_batch_sampler_around_a_distributed_one_is_seen():
    dataset = TensorDataset(torch.arange(3))
    sampler = DistributedSampler(dataset, 2, 1, shuffle=False)
    samples = RealSamples(DataLoader(dataset, batch_sampler=BatchSampler(sampler, 2, False)))
    assert samples.take(2) == 1


@pytest.mark.parametrize("loader", [DataLoader(range(3)), [1, 2, 3], None])
def test_without_such_a_sampler_every_sample_is_real(loader):
    samples = RealSamples(loader)
    assert [samples.take(5), samples.take(5)] == [5, 5]
