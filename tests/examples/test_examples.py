"""Every example: its README's commands are run, and its raw mIoU is torchmetrics'."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning_stubs import SILENT
from torch import Tensor
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassJaccardIndex

from lightning_samrefine import RefineConfig, Refiner, SAMRefineCallback, load_sam
from lightning_samrefine.demo.scenes import ScenesDataset
from lightning_samrefine.demo.segmenter import SmallSegmenter

EXAMPLES = Path(__file__).parents[2] / "examples"
BLOCK = re.compile(r"```bash\n(.*?)```", re.DOTALL)
FIGURE = re.compile(r"^(?:val|test)/(miou_\w+) (\S+)$", re.MULTILINE)
MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)

Pairs = list[tuple[Tensor, Tensor]]

pytestmark = pytest.mark.slow


def commands(name: str) -> list[list[str]]:
    """Return the commands of an example's README, without the installation."""
    (block,) = BLOCK.findall((EXAMPLES / name / "README.md").read_text(encoding="utf-8"))
    lines = [shlex.split(line) for line in block.replace("\\\n", " ").strip().splitlines()]
    assert lines[0][:2] == ["pip", "install"]
    assert lines[0][2] in ("lightning-samrefine", "lightning-samrefine[predict]")
    assert all(line[0] == "python" for line in lines[1:])
    return lines[1:]


def copied(name: str, tmp_path: Path) -> Path:
    return shutil.copytree(EXAMPLES / name, tmp_path / name)


def execute(folder: Path, command: list[str]) -> list[dict[str, float]]:
    """Run a command of an example in its folder; returns the figures of each run that it prints."""
    done = subprocess.run(
        [sys.executable, *command[1:]],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    found = [(key, float(value)) for key, value in FIGURE.findall(done.stdout)]
    runs = [dict(found[start : start + 3]) for start in range(0, len(found), 3)]
    for figures in runs:
        gain = figures["miou_refined"] - figures["miou_raw"]
        assert figures["miou_gain"] == pytest.approx(gain, abs=1e-6)
    return runs


def run(name: str, tmp_path: Path) -> tuple[dict[str, float], Path]:
    """Run an example of one command; returns its figures and the folder in which it ran."""
    folder = copied(name, tmp_path)
    (command,) = commands(name)
    (figures,) = execute(folder, command)
    return figures, folder


def load(path: Path) -> ModuleType:
    """Import a script without running it."""
    spec = importlib.util.spec_from_file_location(f"example_{path.parent.name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def trained(module: LightningModule, folder: Path) -> LightningModule:
    """Give a module the weights that a run left in its only checkpoint."""
    (path,) = folder.glob("**/*.ckpt")
    module.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
    return module.eval()


def scenes(length: int = 4, size: int = 128) -> Pairs:
    """Return the images (1, 3, H, W) uint8 and labels (1, H, W) that the examples validate on."""
    items = [ScenesDataset(1, length, size)[index] for index in range(length)]
    return [(item["image"][None], item["mask"][None]) for item in items]


@torch.no_grad()
def miou(
    predict: Callable[[Tensor], Tensor],
    pairs: Pairs,
    num_classes: int = 6,
    ignore_index: int | None = None,
) -> float:
    """Return torchmetrics' mIoU of label maps that are predicted from images."""
    metric = MulticlassJaccardIndex(num_classes, ignore_index=ignore_index)
    predicted = [predict(image) for image, _ in pairs]
    assert len(torch.stack(predicted).unique()) > 1, "one class alone would hide mistakes"
    for labels, (_, target) in zip(predicted, pairs, strict=True):
        metric.update(labels, target)
    return float(metric.compute())


def validated(module: LightningModule, loader: DataLoader, **kwargs) -> dict[str, float]:
    """Validate a module with the callback in this process; returns its figures."""
    callback = SAMRefineCallback("tiny", num_classes=6, **kwargs)
    Trainer(**SILENT, callbacks=[callback]).validate(module, loader, verbose=False)
    return callback.history[-1]


def statements(source: str) -> set[str]:
    """Return every statement of a source, comments aside, with the SAM that needs no download."""
    return {
        ast.unparse(node).replace("'vit_t'", "'tiny'")
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.stmt)
    }


def test_pages_have_the_code_of_examples():
    for page, script in (
        ("README.md", "smp_multiclass/train.py"),
        ("docs/troubleshooting.md", "plain_pytorch/refine.py"),
    ):
        text = (EXAMPLES.parent / page).read_text(encoding="utf-8")
        (snippet,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
        assert statements(snippet) <= statements((EXAMPLES / script).read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "script",
    [
        path
        for path in sorted(EXAMPLES.rglob("*.py"))
        if "SAMRefineCallback" in path.read_text("utf-8")
    ],
    ids=lambda path: path.parent.name,
)
def test_attaching_takes_three_statements(script):
    simple = (ast.ImportFrom, ast.Assign, ast.Expr)
    ours = [
        ast.unparse(node)
        for node in ast.walk(ast.parse(script.read_text(encoding="utf-8")))
        if isinstance(node, simple)
        and re.search(r"SAMRefineCallback|\bcallback\b", ast.unparse(node))
    ]
    code = [line for line in ours if not line.startswith(("'", '"'))]
    assert len(code) == 3, code


def test_every_folder_is_tested():
    names = {path.name for path in EXAMPLES.iterdir() if path.is_dir()}
    tests = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    assert names <= tests, sorted(names - tests)


def test_smp_multiclass(tmp_path):
    pytest.importorskip("segmentation_models_pytorch")
    figures, folder = run("smp_multiclass", tmp_path)
    example = load(folder / "train.py")
    module = trained(example.Segmenter(), folder)
    expected = miou(lambda image: module(image).argmax(dim=1), scenes())
    assert figures["miou_raw"] == pytest.approx(expected, abs=1e-5)

    class LossAlone(example.Segmenter):
        def validation_step(self, batch, batch_idx):
            return self.loss(self(batch["image"]), batch["mask"])

    captured = validated(trained(LossAlone(), folder), example.loader(1, 4))
    assert captured["miou_raw"] == pytest.approx(expected, abs=1e-5)
    assert captured["miou_refined"] == pytest.approx(figures["miou_refined"], abs=1e-3)


def test_smp_binary(tmp_path):
    pytest.importorskip("segmentation_models_pytorch")
    figures, folder = run("smp_binary", tmp_path)
    module = trained(load(folder / "train.py").Segmenter(), folder)
    pairs = [(image / 255, (target > 0).long()) for image, target in scenes()]
    expected = miou(lambda image: (module(image)[:, 0] > 0).long(), pairs, num_classes=2)
    assert figures["miou_raw"] == pytest.approx(expected, abs=1e-5)


def test_torchvision_deeplabv3(tmp_path):
    figures, folder = run("torchvision_deeplabv3", tmp_path)
    example = load(folder / "train.py")
    module = trained(example.Segmenter(), folder)
    pairs = [((image / 255 - MEAN) / STD, target) for image, target in scenes()]
    expected = miou(lambda image: module.network(image)["out"].argmax(dim=1), pairs)
    assert figures["miou_raw"] == pytest.approx(expected, abs=1e-5)

    class WholeOutput(example.Segmenter):
        def validation_step(self, batch, batch_idx):
            return self.network(batch[0])

    loader = DataLoader(example.Normalized(1, 4), 4)
    normalization = {"image_mean": example.MEAN, "image_std": example.STD}
    returned = validated(trained(WholeOutput(), folder), loader, **normalization)
    assert returned["miou_raw"] == pytest.approx(expected, abs=1e-5)


def test_segformer(tmp_path):
    transformers = pytest.importorskip("transformers", minversion="5.0")
    figures, folder = run("segformer", tmp_path)
    example = load(folder / "train.py")
    module = trained(example.Segmenter(), folder)
    processor = transformers.SegformerImageProcessor(size={"height": 128, "width": 128})

    def predict(image):
        outputs = module.network(processor(list(image), return_tensors="pt")["pixel_values"])
        assert outputs.logits.shape[-2:] == (32, 32)
        maps = processor.post_process_semantic_segmentation(outputs, target_sizes=[(128, 128)])
        return torch.stack(maps)

    # Rows and columns 0.625, 1.875, … of 160 are those that the nearest of 128 fall on.
    at = ((torch.arange(128) + 0.5) * 160 / 128).long()
    pairs = [
        (image, torch.where(target == 0, 255, target - 1)[:, at][:, :, at])
        for image, target in scenes(size=160)
    ]
    expected = miou(predict, pairs, num_classes=5, ignore_index=255)
    assert figures["miou_raw"] == pytest.approx(expected, abs=1e-5)


def test_mask2former(tmp_path):
    pytest.importorskip("transformers", minversion="5.24")
    pytest.importorskip("scipy")  # of the network's own loss
    figures, folder = run("mask2former", tmp_path)
    example = load(folder / "train.py")
    module = trained(example.Segmenter(), folder)

    def predict(image):
        outputs = module.network(**example.PROCESSOR(list(image), return_tensors="pt"))
        sizes = [tuple(image.shape[-2:])]
        return torch.stack(
            example.PROCESSOR.post_process_semantic_segmentation(outputs, target_sizes=sizes)
        )

    expected = miou(predict, scenes())
    assert figures["miou_raw"] == pytest.approx(expected, abs=1e-5)


def test_lightning_cli(tmp_path):
    pytest.importorskip("jsonargparse")
    folder = copied("lightning_cli", tmp_path)
    from_file, from_arguments = commands("lightning_cli")
    (figures,) = execute(folder, from_file)
    module = trained(load(folder / "main.py").Segmenter(), folder)
    expected = miou(lambda image: module(image).argmax(dim=1), scenes())
    assert figures["miou_raw"] == pytest.approx(expected, abs=1e-5)
    assert execute(folder, from_arguments) == [figures]


def test_hydra_template(tmp_path):
    folder = copied("hydra_template", tmp_path)
    train, stricter, sweep = commands("hydra_template")
    (figures,) = execute(folder, train)
    (last,) = folder.glob("logs/**/last.ckpt")
    module = load(folder / "src" / "models" / "segmenter.py").Segmenter(6, width=16, lr=0)
    module.load_state_dict(torch.load(last, weights_only=True)["state_dict"])
    # The data module's family of validation scenes for seed 0 is number 1, as scenes() has it.
    expected = miou(lambda image: module(image).argmax(dim=1), scenes())
    assert figures["miou_raw"] == pytest.approx(expected, abs=1e-5)

    others = execute(folder, stricter) + execute(folder, sweep)
    assert len(others) == 4
    assert {other["miou_raw"] for other in others} == {figures["miou_raw"]}
    assert others[1] == figures, "default is the first of the sweep"
    assert len({other["miou_refined"] for other in others}) > 2


def refined_by_hand(module: SmallSegmenter, pairs: Pairs, preset: str = "default") -> float:
    """Return torchmetrics' mIoU of labels that a refiner makes of a network's probabilities."""
    refiner = Refiner(load_sam("tiny"), RefineConfig.preset(preset))
    return miou(
        lambda image: refiner(image[0], module(image).softmax(dim=1)[0]).labels[None], pairs
    )


def test_fabric(tmp_path):
    figures, _ = run("fabric", tmp_path)
    seed_everything(0)
    module = SmallSegmenter(6).eval()
    expected = miou(lambda image: module(image).argmax(dim=1), scenes())
    assert figures["miou_raw"] == pytest.approx(expected, abs=1e-5)
    # What the callback measures of the same network.
    loader = DataLoader(ScenesDataset(1, 4, size=128), 4)
    logged = validated(module, loader, ignore_index=None)
    assert figures["miou_refined"] == pytest.approx(logged["miou_refined"], abs=1e-3)


def test_plain_pytorch(tmp_path):
    figures, _ = run("plain_pytorch", tmp_path)
    torch.manual_seed(0)
    module = SmallSegmenter(6).eval()
    expected = miou(lambda image: module(image).argmax(dim=1), scenes(length=1))
    assert figures["miou_raw"] == pytest.approx(expected, abs=1e-5)
    by_hand = refined_by_hand(module, scenes(length=1))
    assert figures["miou_refined"] == pytest.approx(by_hand, abs=1e-3)


def test_monai_sliding_window(tmp_path):
    inferers = pytest.importorskip("monai.inferers")
    figures, folder = run("monai_sliding_window", tmp_path)
    module = trained(load(folder / "train.py").Segmenter(), folder)

    def predict(image):
        return inferers.sliding_window_inference(
            image / 255, (64, 64), 4, module.network, overlap=0.25
        ).argmax(dim=1)

    assert figures["miou_raw"] == pytest.approx(miou(predict, scenes()), abs=1e-5)


def test_torchgeo(tmp_path):
    pytest.importorskip("torchgeo.trainers")
    figures, folder = run("torchgeo", tmp_path)
    module = trained(load(folder / "train.py").task(), folder)
    expected = miou(lambda image: module(image / 255).argmax(dim=1), scenes())
    assert figures["miou_raw"] == pytest.approx(expected, abs=1e-5)


def test_torchscript(tmp_path):
    figures, folder = run("torchscript", tmp_path)
    network = torch.jit.load(folder / "network.pt")

    def predict(image):
        coarse = network(image / 127.5 - 1)
        return F.interpolate(coarse, scale_factor=8, mode="bilinear").argmax(dim=1)

    expected = miou(predict, scenes())
    assert figures["miou_raw"] == pytest.approx(expected, abs=1e-5)


def test_ray_data(tmp_path):
    pytest.importorskip("ray.data")
    figures, folder = run("ray_data", tmp_path)
    assert list((folder / "refined").glob("*.parquet"))
    torch.manual_seed(0)
    module = SmallSegmenter(6).eval()
    expected = miou(lambda image: module(image).argmax(dim=1), scenes())
    assert figures["miou_raw"] == pytest.approx(expected, abs=1e-5)
    by_hand = refined_by_hand(module, scenes())
    assert figures["miou_refined"] == pytest.approx(by_hand, abs=1e-3)


def test_fiftyone(tmp_path, monkeypatch):
    if importlib.util.find_spec("fiftyone") is None:
        pytest.skip("fiftyone is absent")
    monkeypatch.setenv("FIFTYONE_DATABASE_DIR", str(tmp_path / "database"))
    monkeypatch.setenv("FIFTYONE_DO_NOT_TRACK", "true")
    figures, _ = run("fiftyone", tmp_path)
    seed_everything(0)
    module = SmallSegmenter(6).eval()
    expected = miou(lambda image: module(image).argmax(dim=1), scenes())
    assert figures["miou_raw"] == pytest.approx(expected, abs=1e-5)
    by_hand = refined_by_hand(module, scenes(), "fast")
    assert figures["miou_refined"] == pytest.approx(by_hand, abs=1e-3)
