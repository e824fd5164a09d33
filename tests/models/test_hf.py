"""Models of transformers: SAM's predictions, every family in a Trainer, and refusals in loading."""

import json
import pickle
import re
import sys
from functools import partial

import pytest
import torch
from lightning.pytorch import Trainer
from lightning_stubs import NUM_CLASSES, REFINE, SILENT, Segmenter, loader
from packaging.version import Version
from segment_anything.modeling import ImageEncoderViT
from tiny_random_sam import small_sam_around, spread_answers
from torch import nn

from lightning_samrefine import RefineConfig, Refiner, SAMRefineCallback, load_sam
from lightning_samrefine.models.sam import SamPromptable

transformers = pytest.importorskip("transformers")

from tiny_hf import DIM, FAMILIES, build_tiny_hf, random_prompts  # noqa: E402 - needs transformers

from lightning_samrefine.models.hf import HfPromptable  # noqa: E402 - as above

pytestmark = pytest.mark.numerical

# segment-anything's names to transformers', in this order.
RENAMED = (
    (r"^image_encoder\.patch_embed\.proj\.", "vision_encoder.patch_embed.projection."),
    (r"^image_encoder\.blocks\.", "vision_encoder.layers."),
    (r"^image_encoder\.neck\.0\.", "vision_encoder.neck.conv1."),
    (r"^image_encoder\.neck\.1\.", "vision_encoder.neck.layer_norm1."),
    (r"^image_encoder\.neck\.2\.", "vision_encoder.neck.conv2."),
    (r"^image_encoder\.neck\.3\.", "vision_encoder.neck.layer_norm2."),
    (r"^image_encoder\.", "vision_encoder."),
    (r"\.norm(\d|_final_attn)\.", r".layer_norm\1."),
    (r"\.layer_norm_final_attn\.", ".layer_norm_final_attn."),
    (r"point_embeddings\.", "point_embed."),
    (r"mask_downscaling\.0\.", "mask_embed.conv1."),
    (r"mask_downscaling\.1\.", "mask_embed.layer_norm1."),
    (r"mask_downscaling\.3\.", "mask_embed.conv2."),
    (r"mask_downscaling\.4\.", "mask_embed.layer_norm2."),
    (r"mask_downscaling\.6\.", "mask_embed.conv3."),
    (r"output_upscaling\.0\.", "upscale_conv1."),
    (r"output_upscaling\.1\.", "upscale_layer_norm."),
    (r"output_upscaling\.3\.", "upscale_conv2."),
    (r"(mlps\.\d|iou_prediction_head)\.layers\.0\.", r"\1.proj_in."),
    (r"(mlps\.\d|iou_prediction_head)\.layers\.1\.", r"\1.layers.0."),
    (r"(mlps\.\d|iou_prediction_head)\.layers\.2\.", r"\1.proj_out."),
    (
        r"^prompt_encoder\.pe_layer\.positional_encoding_gaussian_matrix$",
        "shared_image_embedding.positional_embedding",
    ),
)


def in_transformers_names(state_dict):
    renamed = {}
    for key, value in state_dict.items():
        for pattern, replacement in RENAMED:
            key = re.sub(pattern, replacement, key)
        renamed[key] = value
    matrix = "shared_image_embedding.positional_embedding"
    return {**renamed, f"prompt_encoder.shared_embedding.{matrix.split('.')[1]}": renamed[matrix]}


@pytest.fixture(scope="module")
def twins():
    """One SAM, of segment-anything and of transformers."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(5)
        encoder = ImageEncoderViT(
            img_size=64,
            patch_size=8,
            embed_dim=DIM,
            depth=2,
            num_heads=2,
            out_chans=DIM,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            use_rel_pos=True,
            window_size=3,
            global_attn_indexes=(1,),
        )
        for parameter in encoder.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
        ours = small_sam_around(encoder, 64, 8, DIM)
        spread_answers(ours)
    theirs = build_tiny_hf("sam")
    theirs.module.load_state_dict(in_transformers_names(ours.state_dict()), strict=True)
    return SamPromptable(ours, "ours"), theirs


def blobs(height, width, seed=0, classes=4):
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(1, classes, 5, 6, generator=generator) * 3
    probs = nn.functional.interpolate(coarse, (height, width), mode="bilinear")[0].softmax(dim=0)
    image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)
    return image, probs


@pytest.mark.parametrize("size", [(64, 64), (40, 64), (45, 77), (90, 51), (33, 32)])
def test_segment_anything_and_transformers_refine_alike(twins, size):
    image, probs = blobs(*size)
    config = RefineConfig(pred_iou_thresh=0.2)
    ours, theirs = (Refiner(sam, config, precision="32")(image, probs) for sam in twins)
    assert len(ours.regions) == len(theirs.regions) > 4
    torch.testing.assert_close(ours.regions.pred_iou, theirs.regions.pred_iou, atol=1e-3, rtol=0)
    assert (ours.labels == theirs.labels).float().mean() >= 0.999
    torch.testing.assert_close(ours.probs, theirs.probs, atol=1e-3, rtol=0)
    assert (ours.labels != probs.argmax(dim=0)).any()

    prompts = random_prompts(twins[1], 6)
    full_size = []
    for sam in twins:
        logits, _ = sam.predict_masks(sam.encode_images([image])[0], prompts)
        full_size.append(sam.postprocess_masks(logits, size))
    assert full_size[0].abs().max() > 1
    torch.testing.assert_close(*full_size, atol=1e-3, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_refines_in_a_trainer(family):
    sam = build_tiny_hf(family)
    callback = SAMRefineCallback(sam, num_classes=NUM_CLASSES, refine=REFINE)
    Trainer(**SILENT, callbacks=[callback]).validate(Segmenter(), loader(), verbose=False)
    (figures,) = callback.history
    assert figures["refine_failed_images"] == 0
    assert 0 < figures["refine_accept_rate"] < 1
    assert figures["miou_refined"] != figures["miou_raw"]


@pytest.mark.parametrize("regions_too", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_predicts_masks_of_a_point_grid_in_a_trainer(family, regions_too, monkeypatch):
    sam = build_tiny_hf(family)
    points = []
    predict = sam.predict_masks

    def sure(embedding, prompts, multimask_output=False):
        logits, pred_iou = predict(embedding, prompts, multimask_output)
        if not multimask_output:
            return logits, pred_iou
        points.append(len(prompts))
        return 20 * logits, 0.75 + 0.2 * pred_iou  # random weights are not sure of any mask

    monkeypatch.setattr(sam, "predict_masks", sure)
    config = RefineConfig.preset("default", min_region_area=4, prompt_regions=regions_too)
    callback = SAMRefineCallback(sam, num_classes=NUM_CLASSES, refine=config)
    loaders = loader(2, hw=(64, 80))
    Trainer(**SILENT, callbacks=[callback]).validate(Segmenter(), loaders, verbose=False)
    (figures,) = callback.history
    assert figures["refine_failed_images"] == 0
    assert sum(points) == 2 * 4 * 5  # of every image once
    assert figures["miou_refined"] != figures["miou_raw"]


@pytest.mark.parametrize("family", ["sam", "sam2"])
def test_embeddings_are_cached(family):
    sam = build_tiny_hf(family)
    image, probs = blobs(40, 64)
    config = RefineConfig()
    plain = Refiner(sam, config, "32")(image, probs)
    refiner = Refiner(sam, config, "32", cache="memory")
    for _ in range(2):
        assert torch.equal(refiner(image, probs).labels, plain.labels)
    assert (refiner.cache.stats.misses, refiner.cache.stats.hits) == (1, 1)
    # Another normalization is another embedding.
    other = build_tiny_hf(family)
    other.module.pixel_mean += 1
    Refiner(other, config, "32", cache=refiner.cache)(image, probs)
    assert refiner.cache.stats.misses == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_gives_the_saved_model(tmp_path, family):
    if family == "edgetam" and Version(transformers.__version__) < Version("5.23"):
        pytest.skip("before 5.23 transformers looks EdgeTAM's encoder up at the hub")
    saved = build_tiny_hf(family)
    saved.module.save_pretrained(tmp_path)
    before = torch.random.get_rng_state()
    with pytest.warns(UserWarning, match="does not specify how images are normalized"):
        loaded = load_sam("hf", tmp_path)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert loaded.name == tmp_path.name
    assert not loaded.module.training
    assert not any(p.requires_grad for p in loaded.module.parameters())
    image, _ = blobs(40, 64)
    prompts = random_prompts(saved, 3)
    for found, expected in zip(
        loaded.predict_masks(loaded.encode_images([image])[0], prompts),
        saved.predict_masks(saved.encode_images([image])[0], prompts),
        strict=True,
    ):
        torch.testing.assert_close(found, expected)


@pytest.fixture
def folder(tmp_path):
    """A saved SAM with the settings of its image processor."""
    build_tiny_hf("sam").module.save_pretrained(tmp_path)
    transformers.SamImageProcessor().save_pretrained(tmp_path)
    return tmp_path


def test_pixels_are_normalized_as_in_the_folder(folder):
    sam = load_sam("hf", folder)
    expected = torch.tensor([123.675, 116.28, 103.53])
    torch.testing.assert_close(sam.module.pixel_mean.flatten(), expected)
    settings = folder / "preprocessor_config.json"
    values = json.loads(settings.read_text())
    settings.write_text(json.dumps({**values, "do_normalize": False}))
    plain = load_sam("hf", folder).module
    assert plain.pixel_mean.flatten().tolist() == [0, 0, 0]
    torch.testing.assert_close(plain.pixel_std.flatten(), torch.full((3,), 255.0))
    settings.write_text(json.dumps({**values, "image_mean": 0.5, "image_std": 0.25}))
    gray = load_sam("hf", folder).module
    torch.testing.assert_close(gray.pixel_mean.flatten(), torch.full((3,), 127.5))
    torch.testing.assert_close(gray.pixel_std.flatten(), torch.full((3,), 63.75))


def test_a_video_checkpoint_of_sam_2_gives_its_image_model(tmp_path):
    """The published checkpoints of SAM 2 are of the video model."""
    image_config = build_tiny_hf("sam2").module.config
    config = transformers.Sam2VideoConfig(
        vision_config=image_config.vision_config.to_dict(),
        prompt_encoder_config=image_config.prompt_encoder_config.to_dict(),
        mask_decoder_config=image_config.mask_decoder_config.to_dict(),
        memory_attention_hidden_size=DIM,
        memory_attention_feed_forward_hidden_size=DIM,
        memory_attention_num_layers=1,
        memory_encoder_hidden_size=DIM,
        memory_encoder_output_channels=DIM // 2,
        memory_fuser_embed_dim=DIM,
        memory_fuser_intermediate_dim=DIM,
        mask_downsampler_embed_dim=DIM,
    )
    with torch.random.fork_rng():
        transformers.Sam2VideoModel(config).save_pretrained(tmp_path)
    # Its name in early releases of transformers 5 ends in Fast.
    processor = getattr(transformers, "Sam2ImageProcessor", None)
    (processor or transformers.Sam2ImageProcessorFast)().save_pretrained(tmp_path)
    sam = load_sam("hf", tmp_path)
    assert type(sam.module) is transformers.Sam2Model
    assert sam.encode_images([blobs(40, 64)[0]])[0][0].shape == (1, DIM, 8, 8)


def test_what_is_no_promptable_model_is_refused(tmp_path, folder):
    with pytest.raises(ValueError, match=r"checkpoint must be a hub id for SAM hf, .* got None"):
        load_sam("hf")
    with pytest.raises(FileNotFoundError, match="no/such', which is not a folder"):
        load_sam("hf", tmp_path / "no" / "such")
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ValueError, match="nothing', which cannot be loaded"):
        load_sam("hf", tmp_path / "nothing")
    other = tmp_path / "bert"
    transformers.BertConfig().save_pretrained(other)
    with pytest.raises(ValueError, match=r"promptable model .* SAM 2 and 2\.1, .*cannot be loaded"):
        load_sam("hf", other)
    with pytest.raises(
        TypeError, match=r"module must be one of transformers' SamModel, .* got Linear"
    ):
        HfPromptable(nn.Linear(1, 1), "linear")


def test_a_hub_id_that_is_not_in_the_cache_is_explained_offline(monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"got 'a/b', .*cached in .*HF_HUB_OFFLINE is set"):
        load_sam("hf", "a/b")


def test_incomplete_weights_are_refused(folder):
    """transformers would draw the missing ones at random."""
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    # Copies, for the file below the loaded ones is replaced.
    weights = {name: tensor.clone() for name, tensor in load_file(path).items()}
    lost = {k: v for k, v in weights.items() if "iou_prediction_head" not in k}
    save_file(lost, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"has no 6 weights \(mask_decoder\.iou_prediction_head"):
        load_sam("hf", folder)
    misshapen = {**weights, "mask_decoder.iou_token.weight": torch.zeros(1, 7)}
    save_file(misshapen, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"mask_decoder\.iou_token|promptable model"):
        load_sam("hf", folder)


class _Bomb:
    def __reduce__(self):
        return (pytest.fail, ("pickled code was executed",))


def test_pickled_code_is_never_executed(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"mask_decoder": _Bomb()}))
    with pytest.raises(ValueError, match="checkpoint must be a promptable model of transformers"):
        load_sam("hf", folder)


def test_without_transformers_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r'pip install "lightning-samrefine\[hf\]"'):
        load_sam("hf", "facebook/sam2.1-hiera-small")
