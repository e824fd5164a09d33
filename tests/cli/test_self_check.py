"""`check`: what it finds on this machine, and what it calls a failure."""

from __future__ import annotations

import json
import platform
import re
from importlib import metadata
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from tiny_random_sam import build_random_sam

import lightning_samrefine
from lightning_samrefine import RefineConfig, Refiner, load_sam, self_check
from lightning_samrefine.cli.main import config_dir, run
from lightning_samrefine.demo.scenes import make_scene
from lightning_samrefine.models.sam import SamPromptable
from lightning_samrefine.self_check import ModelCheck, agreement, check, raw_prediction
from lightning_samrefine.utils import machine, precision

FAST = RefineConfig.preset("fast", crf_weight=0)


class Unfaithful(SamPromptable):
    """Computes something else under autocast, as a faulty device would."""

    def predict_masks(self, embedding, prompts, multimask_output=False):
        logits, pred_iou = super().predict_masks(embedding, prompts, multimask_output)
        return (-logits if torch.is_autocast_enabled("cpu") else logits), pred_iou


class Broken(SamPromptable):
    """Fails as a device does that has no such kernel."""

    def encode_images(self, images):
        raise NotImplementedError("no kernel for\n this device")


def unfaithful():
    """What a config of these tests names as its SAM."""
    return Unfaithful(build_random_sam(), "unfaithful")


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(self_check, "IMAGES", 2)
    monkeypatch.setattr(self_check, "SIZE", 128)


@pytest.fixture
def found(short):
    return check(refine=FAST, precision="bf16-mixed", device="cpu")


def test_a_sound_machine_passes_and_the_figures_are_those_of_a_refiner(found):
    assert found.passed
    assert found.verdict == "PASSED on the CPU; no other device was compared"
    (tiny,) = found.models
    assert (tiny.sam, tiny.precision, tiny.images, tiny.failure) == ("tiny", "bfloat16", 2, None)
    assert tiny.device_agreement is None
    assert tiny.cached_agreement == 1
    assert tiny.cached_seconds > 0
    assert 0 < tiny.cold_seconds < found.seconds
    # No process that has loaded torch takes less than 50 MB, and this machine has less than 10 TB.
    assert 5e7 < tiny.peak_memory < 1e13

    sam = load_sam("tiny")
    labels, raw = {"32": [], "bf16-mixed": []}, []
    for index in range(2):
        scene = make_scene(self_check._SEED, index, 128)
        probs = raw_prediction(scene.labels)
        raw.append(probs.numpy().argmax(axis=0))
        for name, maps in labels.items():
            maps.append(Refiner(sam, FAST, name)(scene.image, probs).labels.numpy())
    exact, chosen = np.stack(labels["32"]), np.stack(labels["bf16-mixed"])
    assert tiny.precision_agreement == pytest.approx((exact == chosen).mean(), abs=1e-12)
    assert tiny.changed == pytest.approx((chosen != np.stack(raw)).mean(), abs=1e-12)
    assert tiny.changed > 0


def test_the_block_for_a_bug_report_has_every_version_and_the_processor(found):
    block = found.report()
    assert block.startswith("```text\nverdict: PASSED")
    assert block.endswith("```")
    assert f"python {platform.python_version()}" in block
    for name in ("lightning", "torchvision", "torchmetrics", "hydra-core"):
        assert f"{name} {metadata.version(name)}" in block
    assert f"torch {torch.__version__}" in block
    assert torch.backends.cpu.get_cpu_capability() in found.machine["CPU"]
    assert "precision: bfloat16, because precision=bf16-mixed was set" in block
    assert block in str(found)
    json.dumps(dict(found.machine))  # plain text alone


def test_labels_that_depend_on_the_precision_fail(short):
    result = check(unfaithful(), refine=FAST, precision="bf16-mixed", device="cpu")
    tiny, theirs = result.models
    assert tiny.failure is None
    assert not result.passed
    assert theirs.precision_agreement < 0.999
    assert re.search(r"FAILED on cpu\. unfaithful: labels are equal on \d\d\.\d+% of", str(result))
    assert "in bfloat16 as in float32, 99.9% is the least" in result.verdict


def test_in_float32_on_a_cpu_nothing_else_is_compared(short):
    tiny = check(refine=FAST, precision="32", device="cpu").models[0]
    assert tiny.precision == "float32"
    assert tiny.precision_agreement is None


def test_an_error_while_refining_is_reported_not_raised(short):
    sam = Broken(build_random_sam(), "broken")
    result = check(sam, refine=FAST, device="cpu")
    assert not result.passed
    assert result.models[1].failure == "NotImplementedError: no kernel for this device"
    assert "failure: NotImplementedError" in result.report()


@pytest.mark.parametrize("share", [0.9989, None])
def test_another_device_must_give_the_labels_of_the_cpu(share):
    found = ModelCheck("tiny", "float32", "", cached_agreement=1.0, accepted=3, changed=0.1)
    found.device_agreement = share
    failure = self_check._failure(found, torch.device("cuda"), needs_accepted=True)
    expected = "labels are equal on 99.890% of pixels on cuda as on the CPU, in float32, 99.9% is "
    assert failure == (share and expected + "the least")


def test_a_check_in_which_nothing_happens_fails():
    found = ModelCheck("tiny", "float32", "", cached_agreement=1.0, accepted=0, changed=0.0)
    failure = self_check._failure(found, torch.device("cpu"), needs_accepted=True)
    assert failure == "nothing was refined, so equal labels prove nothing"
    assert self_check._failure(found, torch.device("cpu"), needs_accepted=False) is None


def test_agreement_counts_equal_pixels():
    first = [torch.tensor([[0, 1], [2, 3]]), torch.tensor([[5, 5]])]
    second = [torch.tensor([[0, 1], [2, 0]]), torch.tensor([[5, 6]])]
    assert agreement(first, second) == pytest.approx(4 / 6)


def test_thresholds_of_single_classes_are_left_out(short):
    """A tuned.yaml names classes that the scenes do not have."""
    config = RefineConfig.preset("fast", classes=(17,), class_pred_iou_thresh={17: 0.9})
    assert check(refine=config, device="cpu").models[0].images == 2


def test_a_slow_model_refines_fewer_images(short, monkeypatch):
    monkeypatch.setattr(self_check, "_SECONDS", 0.0)
    assert check(refine=FAST, device="cpu").models[0].images == 1


def test_wrong_arguments_are_refused_before_any_work():
    with pytest.raises(ValueError, match=r"checkpoint must be None without a sam, got 'a\.pt'"):
        check(checkpoint="a.pt")
    with pytest.raises(ValueError, match=r"precision must be .*, got 'half'"):
        check(precision="half")
    with pytest.raises(ValueError, match="device must be one that torch can use here, got 'non"):
        check(device="nonsense")


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_a_gpu_that_is_not_there_is_named_by_the_command_too(short):
    with pytest.raises(ValueError, match=r"got 'cuda' \("):
        command("trainer.accelerator=gpu")


def test_a_gpu_is_described(monkeypatch):
    gpu = SimpleNamespace(name="GPU 9", total_memory=80_000_000_000, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    monkeypatch.setattr(machine.shutil, "which", lambda name: None)
    facts = machine.describe_machine(torch.device("cuda", 1))
    assert facts["device"] == "cuda:1, GPU 9, 80 GB, compute capability 9.0"
    assert facts["driver"].startswith("unknown (no nvidia-smi), torch built for CUDA")


def test_the_reason_of_a_precision_has_the_hardware(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    for has, dtype, words in (
        (True, torch.bfloat16, "the CPU has bf16 instructions"),
        (False, None, "the CPU has no bf16 instructions, or torch is too old to detect them"),
    ):
        monkeypatch.setattr(precision, "_cpu_has_bf16", lambda has=has: has)
        assert precision.choose_precision("auto", cpu) == (dtype, words)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert precision.choose_precision("auto", cuda)[0] is torch.float16
    assert precision.choose_precision("16-mixed", cpu) == (
        torch.float16,
        "precision=16-mixed was set",
    )


def command(*overrides):
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        return run(compose("samrefine", ["task=check", "output_dir=none", *overrides]))


def test_the_command_prints_the_verdict_and_exits_with_it(short, capsys):
    quick = ("refine=fast", "trainer.accelerator=cpu", "callback.precision=bf16-mixed")
    assert command(*quick) is None
    assert "PASSED on the CPU" in capsys.readouterr().out
    with pytest.raises(SystemExit) as exit_info:
        command(*quick, "sam=custom", "sam._target_=test_self_check.unfaithful")
    assert exit_info.value.code == 1
    assert "FAILED on cpu. unfaithful" in capsys.readouterr().out


def test_check_is_public():
    assert lightning_samrefine.check is check
