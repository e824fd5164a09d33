"""Maps in recycled memory: never shared while held, and always zeros."""

import gc

import pytest
import torch

from lightning_samrefine.fusion import MapRefinement
from lightning_samrefine.recycling import RecycledMemory


@pytest.fixture
def memory():
    return RecycledMemory(idle_bytes=4 * 1000)


def test_memory_comes_back_as_zeros_once_nobody_holds_it(memory):
    first = memory.zeros_like(torch.empty(2, 10, 10))
    assert first.dtype == torch.float32
    address = first.data_ptr()
    first.fill_(7)
    del first
    again = memory.zeros_like(torch.empty(3, 5, 11))  # smaller, and of another shape
    assert again.data_ptr() == address
    assert again.shape == (3, 5, 11)
    assert not again.any()


def test_empty_memory_is_lent_alike(memory):
    first = memory.empty_like(torch.zeros(2, 10, 10))
    address = first.data_ptr()
    other = memory.empty_like(first)
    assert other.shape == first.shape
    assert other.data_ptr() != address
    del first
    assert memory.empty_like(torch.zeros(3, 5, 11)).data_ptr() == address


@pytest.mark.parametrize(
    "derive",
    [
        lambda tensor: tensor[1, 2:5],
        lambda tensor: tensor.detach().view(-1),
        lambda tensor: tensor.untyped_storage(),
        lambda tensor: tensor.numpy(),
        lambda tensor: memoryview(tensor.numpy()[0]),
    ],
    ids=["slice", "detached", "storage", "numpy", "memoryview"],
)
def test_what_is_held_in_any_form_is_not_given_to_another(memory, derive):
    tensor = memory.zeros_like(torch.empty(2, 10, 10))
    address = tensor.data_ptr()
    held = derive(tensor)
    del tensor
    gc.collect()
    other = memory.zeros_like(torch.empty(2, 10, 10))
    assert other.data_ptr() != address
    del held
    gc.collect()
    assert memory.zeros_like(torch.empty(2, 10, 10)).data_ptr() == address


def test_tensors_that_live_together_never_overlap(memory):
    memory.zeros_like(torch.empty(10, 10))  # lies idle, and goes to one of them only
    tensors = [memory.zeros_like(torch.empty(10, 10)) for _ in range(6)]
    for value, tensor in enumerate(tensors):
        tensor.fill_(value)
    assert [tensor.unique().tolist() for tensor in tensors] == [[value] for value in range(6)]


def test_no_more_lies_idle_than_allowed(memory):
    tensors = [memory.zeros_like(torch.empty(300)) for _ in range(5)]
    youngest = tensors[-1].data_ptr()
    while tensors:
        del tensors[0]
    assert [array.size for array in memory._idle.values()] == [300, 300, 300]
    assert youngest in {array.ctypes.data for array in memory._idle.values()}
    memory.zeros_like(torch.empty(1001))  # larger than the limit by itself
    assert 1001 not in {array.size for array in memory._idle.values()}


def test_a_small_map_does_not_hold_on_to_large_memory(memory):
    address = memory.zeros_like(torch.empty(900)).data_ptr()
    assert memory.zeros_like(torch.empty(100)).data_ptr() != address
    assert memory.zeros_like(torch.empty(500)).data_ptr() == address


def test_the_map_of_one_image_is_not_seen_in_the_next():
    probs = torch.full((3, 40, 50), 1 / 3)
    labels = torch.zeros(40, 50, dtype=torch.int64)

    def fused(rows):
        refinement = MapRefinement(probs, labels)
        mask = torch.full((40, 50), -1.0)
        mask[rows] = 9
        refinement.add(mask, 1)
        return refinement.finish()[1]

    kept = fused(slice(0, 10))
    expected = kept.clone()
    fused(slice(10, 20))  # let go at once
    later = fused(slice(30, 40))
    assert torch.equal(kept, expected)
    assert later[1, 30:].min() > 0.3
    assert not later[:, :30].any()
