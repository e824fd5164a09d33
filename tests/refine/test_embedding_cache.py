"""The embedding cache: what hits, what never may, and what damage does to it."""

import contextlib
import errno
import os
import resource
import signal
import subprocess
import sys
import time
import warnings
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from cache_cases import embed, images, make_cache
from stub_sams import CountingSam
from tiny_random_sam import build_random_sam

from lightning_samrefine import RefineConfig, Refiner
from lightning_samrefine.models.sam import SamPromptable
from lightning_samrefine.refine.cache.embedding_cache import EmbeddingCache
from lightning_samrefine.refine.cache.stores import DiskStore, Entry, MemoryStore

CONFIG = RefineConfig()
KINDS = ["memory", "disk"]
ROOT = Path(__file__).parents[2]


@pytest.fixture
def sam():
    return CountingSam()


@pytest.fixture(params=KINDS)
def cache(request, tmp_path):
    return make_cache(request.param, tmp_path)


@pytest.fixture(autouse=True)
def loud():
    """Whatever the cache complains about is an error, unless a test expects it."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        yield


def blobs(image, seed=0):
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(1, 3, 4, 5, generator=generator) * 4
    return torch.nn.functional.interpolate(noise, image.shape[1:], mode="bilinear")[0].softmax(0)


# --- hits ---


@pytest.mark.parametrize("precision", ["32", "bf16-mixed"])
def test_the_second_epoch_embeds_nothing_and_gives_equal_bits(cache, sam, precision):
    refiner = Refiner(sam, CONFIG, precision, cache=cache)
    batch = images(3)
    probs = [blobs(image) for image in batch]
    first = refiner.refine_batch(batch, probs)
    assert cache.stats.misses == 3
    # In another order and in other batches.
    second = [refiner(batch[i], probs[i]) for i in (2, 0, 1)]
    assert sam.calls == [3]
    assert (cache.stats.hits, cache.stats.misses) == (3, 3)
    for i, again in zip((2, 0, 1), second, strict=True):
        assert torch.equal(again.labels, first[i].labels)
        assert torch.equal(again.probs, first[i].probs)
        assert torch.equal(again.regions.pred_iou, first[i].regions.pred_iou)
        assert len(again.regions) > 0


class UnroundedSam(CountingSam):
    """Embeds with a mantissa of 24 bits, as a norm in float32 behind an encoder in bf16 does."""

    def encode_images(self, images):
        return [embedding * 1.2345678 for embedding in super().encode_images(images)]


@pytest.mark.parametrize("precision", ["32", "bf16-mixed"])
@pytest.mark.parametrize("preset", ["algorithm4", "default", "points alone"])
def test_a_cache_changes_no_bit_of_a_refinement(cache, precision, preset):
    sam = UnroundedSam()
    (image,) = images(1, size=(48, 60))
    probs = blobs(image)
    with torch.autocast("cpu", torch.bfloat16):
        (embedding,) = sam.encode_images([image])
    assert not torch.equal(embedding, embedding.bfloat16().float())
    options = {"min_region_area": 1, "pred_iou_thresh": 0.45}
    if preset == "points alone":
        config = RefineConfig.preset("default", **options, prompt_regions=False)
    else:
        config = RefineConfig.preset(preset, **options)
    uncached = Refiner(sam, config, precision)(image, probs)
    assert (uncached.labels != probs.argmax(dim=0)).any()
    caching = Refiner(sam, config, precision, cache=cache)
    for _ in range(2):
        cached = caching(image, probs)
        for name in ("labels", "probs", "covered", "pred_iou", "boxes"):
            assert torch.equal(getattr(cached, name), getattr(uncached, name)), name
        assert torch.equal(cached.regions.pred_iou, uncached.regions.pred_iou)
        assert torch.equal(cached.regions.masks, uncached.regions.masks)
    assert cache.stats.hits > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_without_autocast_and_beside_embeddings_nothing_is_rounded(cache, sam, dtype):
    value = torch.full((2, 3), 1 / 3, dtype=torch.float64).to(dtype)
    kept = [embed(cache, sam, images(1), None, lambda _: [value])[0] for _ in range(2)]
    derived = [
        embed(cache, sam, images(1), torch.bfloat16, lambda _: [(value,)], "masks")[0][0]
        for _ in range(2)
    ]
    assert cache.stats.hits == 2
    for found in (*kept, *derived):
        assert found.dtype == dtype
        assert torch.equal(found, value)


def test_in_float32_a_cache_changes_no_bit(cache, sam):
    (image,) = images(1)
    for _ in range(2):
        assert torch.equal(embed(cache, sam, [image])[0], sam.encode_images([image])[0])


def test_in_bf16_a_miss_is_rounded_as_a_hit_is(cache, sam):
    (image,) = images(1)
    missed, hit = (embed(cache, sam, [image], torch.bfloat16)[0] for _ in range(2))
    assert torch.equal(missed, hit)
    assert torch.equal(missed, sam.encode_images([image])[0].bfloat16().float())
    assert missed.dtype == torch.float32


def test_a_batch_embeds_only_what_is_missing_and_equal_images_once(cache, sam):
    first, second, third = images(3)
    embed(cache, sam, [second])
    found = embed(cache, sam, [first, second, third, first])
    assert sam.calls == [1, 2]
    for got, image in zip(found, (first, second, third, first), strict=True):
        assert torch.equal(got, sam.encode_images([image])[0])


def test_a_reader_cannot_change_what_is_kept(cache, sam):
    (image,) = images(1)
    expected = sam.encode_images([image])[0]
    for _ in range(3):
        embed(cache, sam, [image])[0].zero_()
    assert torch.equal(embed(cache, sam, [image])[0], expected)
    assert cache.stats.misses == 1


def test_embeddings_of_several_tensors_are_kept(cache, sam):
    def compute(batch):
        return [(image.float().mean(dim=0), image[:, :1].clone()) for image in batch]

    missed, hit = (embed(cache, sam, images(1), torch.bfloat16, compute)[0] for _ in range(2))
    assert cache.stats.hits == 1
    assert [t.dtype for t in hit] == [torch.float32, torch.uint8]
    assert all(torch.equal(a, b) for a, b in zip(missed, hit, strict=True))


def test_another_process_would_hit_what_lies_on_disk(tmp_path, sam):
    batch = images(3)
    embed(make_cache("disk", tmp_path), sam, batch)
    fresh = make_cache("disk", tmp_path)
    embed(fresh, SamPromptable(build_random_sam(), "random"), batch)
    assert (fresh.stats.hits, fresh.stats.misses) == (3, 0)


# --- what must never hit ---


def test_whatever_differs_never_hits(cache, sam):
    (image,) = images(1)
    embed(cache, sam, [image])
    pixel = image.clone()
    pixel[2, 23, 31] ^= 1
    renamed = CountingSam()
    renamed.name = "other"
    others = {
        "one pixel": (sam, pixel, None),
        "same bytes, other shape": (sam, image.reshape(3, 32, 24), None),
        "transposed": (sam, image.transpose(1, 2), None),
        "precision": (sam, image, torch.bfloat16),
        "another precision": (sam, image, torch.float16),
        "weights": (CountingSam(seed=1), image, None),
        "name": (renamed, image, None),
    }
    for number, (name, (model, changed, dtype)) in enumerate(others.items(), 2):
        found = embed(cache, model, [changed], dtype)[0]
        assert (cache.stats.hits, cache.stats.misses) == (0, number), name
        if dtype is None:
            assert torch.equal(found, model.encode_images([changed])[0]), name
    embed(cache, sam, [image])
    assert cache.stats.hits == 1


def test_weights_that_change_unseen_by_torch_are_noticed_on_a_recheck(cache, sam):
    (image,) = images(1)
    embed(cache, sam, [image])
    cache.recheck(sam.module)
    embed(cache, sam, [image])
    assert cache.stats.hits == 1
    next(sam.module.image_encoder.parameters()).data.view(-1)[-1] += 0.5
    cache.recheck(sam.module)
    assert torch.equal(embed(cache, sam, [image])[0], sam.encode_images([image])[0])
    assert cache.stats.hits == 1


@pytest.mark.parametrize("what", ["one weight in place", "loaded weights", "pixel_mean"])
def test_a_model_that_changes_never_hits_again(cache, sam, what):
    (image,) = images(1)
    embed(cache, sam, [image])
    with torch.no_grad():
        if what == "one weight in place":
            next(sam.module.image_encoder.parameters()).view(-1)[-1] += 0.5
        elif what == "loaded weights":
            sam.module.load_state_dict(build_random_sam(seed=2).state_dict())
        else:
            sam.module.pixel_mean += 30
    found = embed(cache, sam, [image])[0]
    assert cache.stats.hits == 0
    assert torch.equal(found, sam.encode_images([image])[0])


def test_equal_weights_in_another_module_do_hit(cache, sam):
    (image,) = images(1)
    embed(cache, sam, [image])
    embed(cache, SamPromptable(deepcopy(sam.module), "random"), [image])
    assert cache.stats.hits == 1


def test_code_version_is_part_of_the_key(tmp_path, sam, monkeypatch):
    embed(make_cache("disk", tmp_path), sam, images(1))
    monkeypatch.setattr("lightning_samrefine.refine.cache.embedding_cache.CODE_VERSION", -1)
    newer = make_cache("disk", tmp_path)
    embed(newer, sam, images(1))
    assert newer.stats.hits == 0


# --- damage ---


def damage(path, how):
    content = path.read_bytes()
    if how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "garbage":
        path.write_bytes(os.urandom(len(content)))
    elif how == "one byte of the tensor":
        path.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    else:  # zeros, as a power cut leaves them
        path.write_bytes(content[:-400] + bytes(400))


@pytest.mark.parametrize("how", ["truncated", "empty", "garbage", "one byte of the tensor", "0"])
def test_a_torn_file_is_replaced_without_a_word(tmp_path, sam, how):
    (image,) = images(1)
    expected = embed(make_cache("disk", tmp_path), sam, [image])[0]
    (path,) = tmp_path.iterdir()
    damage(path, how)
    cache = make_cache("disk", tmp_path)
    assert torch.equal(embed(cache, sam, [image])[0], expected)
    assert torch.equal(embed(cache, sam, [image])[0], expected)
    assert (cache.stats.hits, cache.stats.misses) == (1, 1)


def test_a_file_under_another_name_is_no_hit(tmp_path, sam):
    first, second = images(2)
    cache = make_cache("disk", tmp_path)
    embed(cache, sam, [first])
    (one,) = tmp_path.iterdir()
    embed(cache, sam, [second])
    (two,) = set(tmp_path.iterdir()) - {one}
    two.write_bytes(one.read_bytes())
    assert torch.equal(embed(cache, sam, [second])[0], sam.encode_images([second])[0])
    assert cache.stats.hits == 0


FILL = """
import sys
sys.path.insert(0, {tests!r})
import torch
from cache_cases import embed, images, make_cache
from stub_sams import CountingSam
torch.set_num_threads(1)
cache, sam, batch = make_cache("disk", {folder!r}), CountingSam(), images(40)
order = batch if {forward} else batch[::-1]
print("ready", flush=True)
sys.stdin.readline()
while True:
    for image in order:
        embed(cache, sam, [image])
    if not {forever}:
        break
    for path in cache._store.folder.iterdir():
        path.unlink(missing_ok=True)
assert cache.stats.hits + cache.stats.misses == 40
"""


def start_filling(folder, forward=True, forever=False):
    """Start a process that embeds 40 images into a folder once it gets a line of input."""
    code = FILL.format(
        tests=str(ROOT / "tests" / "helpers"), folder=str(folder), forward=forward, forever=forever
    )
    return subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )


@pytest.mark.slow
def test_two_processes_fill_one_folder_at_once(tmp_path, sam):
    processes = [start_filling(tmp_path, forward) for forward in (True, False)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    for process in processes:
        process.communicate()
        assert process.returncode == 0
    batch = images(40)
    cache = make_cache("disk", tmp_path)
    found = embed(cache, sam, batch)
    assert cache.stats.hits == 40
    assert torch.equal(torch.cat(found), torch.cat(sam.encode_images(batch)))
    assert len(list(tmp_path.iterdir())) == 40


@pytest.mark.slow
def test_a_process_killed_while_it_writes_leaves_only_whole_files(tmp_path, sam):
    process = start_filling(tmp_path, forever=True)
    assert process.stdout.readline() == "ready\n"
    process.stdin.write("\n")
    process.stdin.flush()
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("*.safetensors")) and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    # As many temporary files as a kill may leave, and one more that certainly is one.
    (tmp_path / "0123.4567.tmp").write_bytes(b"half a hea")
    batch = images(40)
    cache = make_cache("disk", tmp_path)
    names = set(tmp_path.glob("*.safetensors"))
    found = embed(cache, sam, batch)
    assert cache.stats.hits == len(names)  # not one of them was torn
    assert torch.equal(torch.cat(found), torch.cat(sam.encode_images(batch)))

    for path in tmp_path.glob("*.tmp"):
        os.utime(path, (time.time() - 7200,) * 2)
    embed(make_cache("disk", tmp_path), sam, images(1, seed=9))
    assert not list(tmp_path.glob("*.tmp"))
    assert len(list(tmp_path.glob("*.safetensors"))) == 41


def test_a_temporary_file_of_a_living_process_stays(tmp_path, sam):
    (tmp_path / "key.id.tmp").write_bytes(b"in the making")
    embed(make_cache("disk", tmp_path), sam, images(1))
    assert (tmp_path / "key.id.tmp").exists()


# --- failures ---


def test_a_folder_that_cannot_be_made_costs_one_warning(tmp_path, sam):
    (tmp_path / "file").write_text("in the way")
    cache = make_cache("disk", tmp_path / "file" / "cache")
    refiner = Refiner(sam, CONFIG, "32", cache=cache)
    batch = images(2)
    with pytest.warns(RuntimeWarning, match="Embedding cache: .*The run goes on") as record:
        found = [refiner(image, blobs(image)) for image in batch]
    assert len(record) == 1
    assert torch.equal(
        found[1].labels, Refiner(sam, CONFIG, "32")(batch[1], blobs(batch[1])).labels
    )


def test_a_folder_that_turns_read_only_is_still_read(tmp_path, sam, monkeypatch):
    kept, new, newer = images(3)
    cache = make_cache("disk", tmp_path)
    embed(cache, sam, [kept])

    def refuse(self, *arguments):
        raise PermissionError(13, "Permission denied", str(self))

    # Permission bits do not bind every user that tests run as.
    monkeypatch.setattr(Path, "write_bytes", refuse)
    with pytest.warns(RuntimeWarning, match="PermissionError") as record:
        found = embed(cache, sam, [new, newer])
    assert len(record) == 1
    for got, image in zip(found, (new, newer), strict=True):
        assert torch.equal(got, sam.encode_images([image])[0])
    embed(cache, sam, [kept])
    assert cache.stats.hits == 1
    assert len(list(tmp_path.iterdir())) == 1


def test_a_full_disk_leaves_nothing_half_written(tmp_path, sam, monkeypatch):
    def fill_up(self, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", fill_up)
    with pytest.warns(RuntimeWarning, match="No space left"):
        embed(make_cache("disk", tmp_path), sam, images(2))
    assert not list(tmp_path.iterdir())


def test_embeddings_of_an_unknown_type_are_passed_on(cache, sam):
    def compute(batch):
        return [{"features": image} for image in batch]

    batch = images(2)
    with pytest.warns(RuntimeWarning, match="a tuple of tensors, got dict") as record:
        found = embed(cache, sam, batch, None, compute)
    assert len(record) == 1
    assert [entry["features"] is image for entry, image in zip(found, batch, strict=True)] == [
        True
    ] * 2


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EMFILE, "Too many open files"),
        OSError(errno.EIO, "Input/output error"),
        OSError(errno.ESTALE, "Stale file handle"),
        MemoryError(),
    ],
    ids=["EMFILE", "EIO", "ESTALE", "memory"],
)
def test_a_file_that_cannot_be_read_just_now_stays(tmp_path, sam, monkeypatch, error):
    (image,) = images(1)
    expected = embed(make_cache("disk", tmp_path), sam, [image])[0]

    def refuse(*arguments, **keywords):
        raise error

    cache = make_cache("disk", tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("lightning_samrefine.refine.cache.stores.safe_open", refuse)
        with pytest.warns(RuntimeWarning, match=type(error).__name__):
            assert torch.equal(embed(cache, sam, [image])[0], expected)
    fresh = make_cache("disk", tmp_path)
    assert torch.equal(embed(fresh, sam, [image])[0], expected)
    assert (fresh.stats.hits, fresh.stats.misses) == (1, 0)


def test_a_process_without_free_file_descriptors_deletes_nothing(tmp_path):
    store = DiskStore(10**6, tmp_path)
    store.put("key", entry(1000))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.dup(0)
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, hard))
    try:
        with contextlib.suppress(Exception):
            store.get("key")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert store.get("key") is not None


# --- limits ---


def entry(size, value=0.0):
    return Entry((torch.full((size // 4,), float(value)),), "tensor float32")


def test_memory_forgets_what_was_used_longest_ago():
    store = MemoryStore(1000)
    for key in "abc":
        store.put(key, entry(300))
    assert store.get("a") is not None
    store.put("d", entry(300))
    assert [store.get(key) is not None for key in "abcd"] == [True, False, True, True]
    store.put("e", entry(800))
    assert [store.get(key) is not None for key in "acde"] == [False, False, False, True]
    store.put("f", entry(1004))
    assert store.get("f") is None
    assert store.get("e") is not None
    assert (store.nbytes, store.evictions) == (800, 5)


def test_disk_forgets_what_was_used_longest_ago(tmp_path):
    store = DiskStore(5600, tmp_path)  # four files of 1000 bytes and a header
    for number in range(4):
        store.put(str(number), entry(1000, number))
        os.utime(tmp_path / f"{number}.safetensors", (number, number))
    assert store.get("0") is not None
    store.put("4", entry(1000, 4))
    found = [store.get(str(number)) for number in range(5)]
    assert found[1] is None
    assert all(found[n].tensors[0].tolist() == [n] * 250 for n in (0, 2, 3, 4))
    for number in range(5, 25):
        store.put(str(number), entry(1000))
        size = sum(path.stat().st_size for path in tmp_path.iterdir())
        assert size == store.nbytes <= 5600
    store.put("large", entry(6000))
    assert store.get("large") is None


def test_what_others_wrote_counts_against_the_limit(tmp_path):
    mine, theirs = DiskStore(20_000, tmp_path), DiskStore(10**9, tmp_path)
    mine.put("mine", entry(1000))
    for number in range(30):
        theirs.put(str(number), entry(1000))
    for number in range(17):
        mine.put(f"mine {number}", entry(1000))
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 20_000 + 16 * 1300


def test_files_may_vanish_while_room_is_made(tmp_path, monkeypatch):
    store = DiskStore(3000, tmp_path)
    store.put("0", entry(1000))
    store.put("1", entry(1000))
    unlink = Path.unlink

    def too_late(self, missing_ok=False):
        unlink(self)
        unlink(self, missing_ok)

    monkeypatch.setattr(Path, "unlink", too_late)
    store.put("2", entry(1000))
    monkeypatch.undo()
    assert store.get("2") is not None


@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_keeps_to_its_limit(tmp_path, sam, kind):
    cache = make_cache(kind, tmp_path, gb=30e-6)  # three embeddings of 32 × 8 × 8 float32
    for image in images(8):
        embed(cache, sam, [image])
    assert 8000 < cache.stats.nbytes <= 30_000
    embed(cache, sam, images(8)[-3:])
    assert cache.stats.hits == 3


# --- epochs ---


def test_changing_images_are_noticed_after_two_epochs(cache, sam):
    for seed in (0, 1):
        embed(cache, sam, images(3, seed=seed))
        if seed == 0:
            cache.end_epoch("val")
    held = cache.stats.nbytes
    with pytest.warns(RuntimeWarning, match="images or SAM's weights change") as record:
        cache.end_epoch("val")
    assert len(record) == 1
    embed(cache, sam, images(3, seed=2))
    cache.end_epoch("val")
    assert cache.stats.nbytes == held
    embed(cache, sam, images(3, seed=0))  # what was kept is still found
    assert cache.stats.hits == 3


def test_unchanging_images_and_other_stages_raise_no_alarm(cache, sam):
    for _ in range(3):
        embed(cache, sam, images(3))
        cache.end_epoch("val")
    embed(cache, sam, images(3, seed=1))
    cache.end_epoch("test")
    cache.end_epoch("val")  # an epoch without a single image
    embed(cache, sam, images(4))  # one new image beside three known
    cache.end_epoch("val")
    assert cache.stats.hits == 9


def test_images_that_do_not_fit_are_distinguished_from_images_that_change(sam, tmp_path):
    cache = make_cache("memory", tmp_path, gb=30e-6)
    batch = images(8)
    for epoch in range(2):
        for image in batch:
            embed(cache, sam, [image])
        if epoch == 0:
            cache.end_epoch("val")
    with pytest.warns(RuntimeWarning, match="do not fit into cache_gb"):
        cache.end_epoch("val")
    for image in batch:
        embed(cache, sam, [image])
    assert cache.stats.hits == 3  # nothing pushes them out any more


@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_a_limit_below_one_image_blames_no_augmentation(sam, tmp_path, kind):
    cache = make_cache(kind, tmp_path, gb=1e-6)
    for epoch in range(2):
        embed(cache, sam, images(2))
        if epoch == 0:
            cache.end_epoch("val")
    with pytest.warns(RuntimeWarning, match=r"do not fit into cache_gb=1e-06"):
        cache.end_epoch("val")
    assert cache.stats.hits == 0


# --- arguments ---


def test_the_refiner_makes_the_chosen_cache(sam, tmp_path, monkeypatch):
    monkeypatch.setenv("SAMREFINE_HOME", str(tmp_path))
    assert Refiner(sam).cache is None
    refiner = Refiner(sam, CONFIG, "32", cache="disk", cache_gb=0.1)
    (image,) = images(1)
    refiner(image, blobs(image))
    assert len(list((tmp_path / "embeddings").iterdir())) == 1
    assert Refiner(sam, cache="memory").cache.kind == "memory"
    own = EmbeddingCache("memory")
    assert Refiner(sam, cache=own).cache is own


def test_the_default_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("SAMREFINE_HOME", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = tmp_path / "lightning-samrefine" / "embeddings"
    assert EmbeddingCache("disk")._store.folder == folder
    monkeypatch.delenv("XDG_CACHE_HOME")
    expected = Path.home() / ".cache" / "lightning-samrefine" / "embeddings"
    assert EmbeddingCache("disk")._store.folder == expected


def test_wrong_arguments_are_refused(sam):
    with pytest.raises(ValueError, match="cache must be 'memory', 'disk' or None, got 'ram'"):
        Refiner(sam, cache="ram")
    with pytest.raises(TypeError, match=r"cache must be .*, got bool"):
        Refiner(sam, cache=True)
    with pytest.raises(ValueError, match="cache_gb must be above 0 or None, got 0"):
        Refiner(sam, cache="memory", cache_gb=0)
    with pytest.raises(TypeError, match="cache_gb must be a number or None, got str"):
        EmbeddingCache("memory", "4")
    with pytest.raises(ValueError, match="folder must be None for a cache in memory"):
        EmbeddingCache("memory", folder="somewhere")
    with pytest.raises(
        ValueError, match="cache_gb must be None beside an EmbeddingCache, which has one, got 1"
    ):
        Refiner(sam, cache=EmbeddingCache("memory"), cache_gb=1)
