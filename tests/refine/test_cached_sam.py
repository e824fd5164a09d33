"""A model behind a cache: a model like any other, with less work."""

import pytest
import torch
from cache_cases import images, make_cache
from encoder_cases import vit
from random_predictions import blobs
from stub_sams import CountingSam
from tiny_random_sam import small_sam_around

from lightning_samrefine import RefineConfig, Refiner
from lightning_samrefine.models.base import Promptable, Prompts
from lightning_samrefine.models.sam import SamPromptable
from lightning_samrefine.refine.cache import embedding_cache
from lightning_samrefine.refine.cache.cached_sam import CachedSam
from lightning_samrefine.refine.cache.embedding_cache import EmbeddingCache
from lightning_samrefine.refine.cache.keys import image_digest
from lightning_samrefine.refine.cache.stores import MemoryStore
from lightning_samrefine.refine.decode import encode_images
from lightning_samrefine.testing import CHECKS
from lightning_samrefine.utils.memory import ChunkSize

POINTS = Prompts(None, torch.tensor([[10.0, 20.0], [40.0, 30.0]]))


@pytest.fixture
def sam():
    return CountingSam()


@pytest.fixture
def cached(sam):
    return CachedSam(sam, EmbeddingCache("memory"))


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_it_conforms(cached, check):
    check(cached)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_masks_have_the_bits_of_the_model_without_a_cache(sam, cached, dtype):
    (image,) = images(1)
    with torch.no_grad(), torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        (embedding,) = encode_images(sam, [image], ChunkSize())
        expected = sam.predict_masks(embedding, POINTS, multimask_output=True)
        for _ in range(2):
            (lazy,) = cached.encode_images([image])
            found = cached.predict_masks(lazy, POINTS, multimask_output=True)
            assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    assert sam.calls == [1, 1]


def test_only_missing_images_are_encoded_in_one_call_and_only_when_needed(sam, cached):
    first, second, third = images(3)
    (lazy,) = cached.encode_images([second])
    assert sam.calls == []
    cached.predict_masks(lazy, POINTS)
    assert sam.calls == [1]
    batch = cached.encode_images([first, second, third])
    assert sam.calls == [1]
    for lazy in batch:
        cached.predict_masks(lazy, POINTS)
    assert sam.calls == [1, 2]


def test_the_precision_in_effect_is_part_of_the_key(sam, cached):
    (image,) = images(1)
    for enabled in (False, True, False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            (lazy,) = cached.encode_images([image])
            cached.predict_masks(lazy, POINTS)
    assert sam.calls == [1, 1]


@pytest.mark.parametrize("prompt_regions", [True, False])
def test_an_image_is_hashed_once_and_an_embedding_read_only_to_prompt_regions(
    sam, monkeypatch, prompt_regions
):
    config = RefineConfig.preset("default", min_region_area=1, prompt_regions=prompt_regions)
    refiner = Refiner(sam, config, "32", cache="memory")
    image, probs = blobs()
    refiner(image, probs)
    hashed, read = [], []
    digest, get = embedding_cache.image_digest, MemoryStore.get
    monkeypatch.setattr(
        embedding_cache, "image_digest", lambda array: (hashed.append(1), digest(array))[1]
    )
    monkeypatch.setattr(
        MemoryStore, "get", lambda store, key: (read.append(key), get(store, key))[1]
    )
    refiner(image, probs)
    assert len(hashed) == 1
    assert len(read) == len(set(read)) == 1 + prompt_regions


@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_an_image_without_padding_has_a_key_of_its_own_and_comes_back(kind, tmp_path):
    sam = SamPromptable(small_sam_around(vit(window=3, out_chans=32), 128, 16, 32), "vit")
    cached = CachedSam(sam, make_cache(kind, tmp_path))
    (wide,), (square,) = images(1), images(1, (32, 32))

    def look(at, padding):
        with torch.no_grad():
            (lazy,) = at.encode_images([wide], padding=padding)
            return at.resolve([lazy])[0]

    whole, part = look(cached, padding=True), look(cached, padding=False)
    assert cached.cache.stats.misses == 2
    assert whole.shape == part.shape == (1, 32, 8, 8)
    assert not torch.allclose(whole, part)
    again = CachedSam(sam, make_cache(kind, tmp_path)) if kind == "disk" else cached
    assert torch.equal(look(again, padding=False), part)
    assert torch.equal(look(again, padding=True), whole)
    assert again.cache.stats.hits == 2
    for padding in (True, False):  # a square has one look, as has a model that always pads
        cached.resolve(cached.encode_images([square], padding=padding))
    assert cached.cache.stats.misses == 3
    padding_sam = CountingSam()
    always = CachedSam(padding_sam, EmbeddingCache("memory"))
    for padding in (True, False):
        always.resolve(always.encode_images([wide], padding=padding))
    assert padding_sam.calls == [1]


def test_the_masks_of_a_point_grid_have_the_key_of_their_look():
    sam = SamPromptable(small_sam_around(vit(window=3, out_chans=32), 128, 16, 32), "vit")
    cache = EmbeddingCache("memory")
    image, probs = blobs()
    for padding in (True, False):
        config = RefineConfig.preset("default", min_region_area=1, encode_padding=padding)
        expected = Refiner(sam, config, "32")(image, probs)
        for _ in range(2):
            found = Refiner(sam, config, "32", cache)(image, probs)
            assert torch.equal(found.probs, expected.probs)
    assert (cache.stats.misses, cache.stats.hits) == (4, 4)


def test_a_refiner_keeps_the_users_model_and_wraps_it(sam):
    refiner = Refiner(sam, cache="memory")
    assert refiner.sam is sam
    own = CachedSam(sam, EmbeddingCache("memory"))
    assert isinstance(own, Promptable)
    image, probs = blobs()
    config = RefineConfig.preset("default", min_region_area=1)
    expected = Refiner(sam, config, "32")(image, probs)
    found = Refiner(own, config, "32")(image, probs)
    assert torch.equal(found.labels, expected.labels)
    assert torch.equal(found.probs, expected.probs)
    assert own.cache.stats.misses == 2


@pytest.mark.parametrize("padding", [True, False])
def test_an_image_has_one_hash_however_it_is_encoded(random_sam, padding):
    """A fit identifies images by it: its folds depend neither on padding nor on a cache."""
    image, probs = blobs()
    config = RefineConfig.preset("fast", min_region_area=1, encode_padding=padding)
    (found,) = Refiner(random_sam, config, cache="memory").predict([image], [probs])
    assert found.digest == image_digest(image.numpy())
