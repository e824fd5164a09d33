"""Train the tiny SAM from scratch on scenes, with the prompts that refinement makes.

    python -m benchmarks.train_tiny_sam                  # train, export, evaluate
    python -m benchmarks.train_tiny_sam --resume         # go on from the last checkpoint
    python -m benchmarks.train_tiny_sam --eval-only      # table of the exported weights

A coarse segmenter is simulated from exact labels: its probabilities give regions, boxes, interior
points and mask prompts as Algorithm 4 makes them, and the target of a region is the true component
it stands for. Fresh scenes at every step; validation and test scenes come from families of their
own, which nothing is trained on.
"""

from __future__ import annotations

import argparse
import copy
import csv
import itertools
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from segment_anything.modeling import Sam
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.coarse_prompts import (
    GRID,
    MASK_PROMPT_SCALE,
    MIN_REGION_AREA,
    Prompts,
    make_prompts,
    simulate_coarse,
    training_prompts,
)
from lightning_samrefine.demo.scenes import CLASS_NAMES, Scene, make_scene
from lightning_samrefine.models.tiny import EMBED_DIM, EMBED_STRIDE, IMAGE_SIZE, build_tiny_sam

# Families of scenes (the `seed` of `make_scene`). The training family is offset by --seed.
TRAIN_FAMILY, VALIDATION_FAMILY, TEST_FAMILY = 11_000, 12_000, 13_000
VALIDATION_SCENES, TEST_SCENES = 32, 200

REPOSITORY = Path(__file__).resolve().parents[1]
WEIGHTS = REPOSITORY / "lightning_samrefine/models/weights/tiny_sam.safetensors"

# (uses point, uses box, uses mask) and how often a training image is prompted so.
PROMPT_KINDS: dict[str, tuple[bool, bool, bool]] = {
    "box+point+mask": (True, True, True),
    "box+point": (True, True, False),
    "box": (False, True, False),
    "point": (True, False, False),
    "box+mask": (False, True, True),
}
FULL_PROMPT = "box+point+mask"
KIND_WEIGHTS = (0.66, 0.12, 0.08, 0.05, 0.09)

# Neighbors (dy, dx) on the mask grid which the auxiliary head compares each pixel with.
OFFSETS = ((0, 1), (1, 0), (0, 4), (4, 0), (0, 12), (12, 0), (8, 8), (8, -8))


# --------------------------------------------------------------------------------------------------
# Model and losses
# --------------------------------------------------------------------------------------------------


class AffinityHead(nn.Module):
    """Auxiliary head, dropped on export: foreground and affinities read off the embedding.

    It holds for every mask pixel whether it belongs to an object and to the same object as each of
    its neighbors in `OFFSETS`. That grounds the encoder in borders from the first step on, while
    prompts alone reach it through the whole decoder. No class is given.
    """

    def __init__(self) -> None:
        super().__init__()
        cell = EMBED_STRIDE // 2
        self.project = nn.Conv2d(EMBED_DIM, (1 + len(OFFSETS)) * cell * cell, 1)
        self.shuffle = nn.PixelShuffle(cell)

    def loss(self, embedding: Tensor, instances: Tensor) -> Tensor:
        """Mean cross-entropy of an embedding (B, D, 32, 32) given instances (B, 256, 256)."""
        logits = self.shuffle(self.project(embedding))
        foreground = F.avg_pool2d((instances > 0).float()[:, None], 2)[:, 0]
        total = F.binary_cross_entropy_with_logits(logits[:, 0], foreground)
        coarse = instances[:, ::2, ::2]
        for channel, (dy, dx) in enumerate(OFFSETS, start=1):
            here = (slice(None), slice(0, GRID - dy), slice(max(-dx, 0), GRID - max(dx, 0)))
            there = (slice(None), slice(dy, GRID), slice(max(dx, 0), GRID + min(dx, 0)))
            same = (coarse[here] == coarse[there]).float()
            total = total + F.binary_cross_entropy_with_logits(logits[:, channel][here], same)
        return total / (1 + len(OFFSETS))


def predict(
    sam: Sam, embedding: Tensor, prompts: Prompts, kind: str, *, multimask: bool = False
) -> tuple[Tensor, Tensor]:
    """Decode one image's prompts.

    Args:
        sam: the model.
        embedding: (1, D, 32, 32) embedding of the image.
        prompts: N prompts.
        kind: a key of `PROMPT_KINDS`.
        multimask: also return the three multimask outputs.

    Returns:
        Logits (N, M, 256, 256) and predicted IoU (N, M), M = 1 or 4, single-mask output first.
    """
    use_point, use_box, use_mask = PROMPT_KINDS[kind]
    sparse, dense = sam.prompt_encoder(
        points=(prompts.points, torch.ones(len(prompts), 1)) if use_point else None,
        boxes=prompts.boxes if use_box else None,
        masks=prompts.masks if use_mask else None,
    )
    masks, iou = sam.mask_decoder.predict_masks(
        image_embeddings=embedding,
        image_pe=sam.prompt_encoder.get_dense_pe(),
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense,
    )
    if not multimask:
        masks, iou = masks[:, :1], iou[:, :1]
    size = (IMAGE_SIZE, IMAGE_SIZE)
    return F.interpolate(masks, size, mode="bilinear", align_corners=False), iou


def mask_iou(logits: Tensor, targets: Tensor) -> Tensor:
    """IoU of thresholded logits (N, M, H, W) with targets (N, 1, H, W): (N, M)."""
    prediction = logits > 0
    truth = targets > 0.5
    union = (prediction | truth).flatten(2).sum(2)
    return (prediction & truth).flatten(2).sum(2) / union.clamp_min(1)


def mask_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Per-mask loss (N, M): cross-entropy everywhere, once more near the border, and Dice."""
    target = targets.expand_as(logits)
    entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none").flatten(2)
    # Without its own term the border, a few percent of the pixels, fades against the rest.
    half = F.avg_pool2d(targets, 2)
    blurred = F.avg_pool2d(half, 5, 1, 2, count_include_pad=False)
    mixed = (blurred > 1e-3) & (blurred < 1.0 - 1e-3)
    band = F.interpolate(mixed.float(), scale_factor=2.0, mode="nearest").flatten(2)
    near = (entropy * band).sum(2) / band.sum(2).clamp_min(1.0)
    probability, flat = logits.sigmoid().flatten(2), target.flatten(2)
    dice = 1 - (2 * (probability * flat).sum(2) + 1) / (probability.sum(2) + flat.sum(2) + 1)
    return 5.0 * entropy.mean(2) + near + dice


def image_loss(sam: Sam, embedding: Tensor, prompts: Prompts, kind: str) -> tuple[Tensor, Tensor]:
    """Mask loss and IoU loss of one image's prompts."""
    ambiguous = sum(PROMPT_KINDS[kind]) == 1
    logits, predicted = predict(sam, embedding, prompts, kind, multimask=ambiguous)
    matched = prompts.matched
    true_iou = mask_iou(logits.detach(), prompts.targets)
    iou_loss = F.mse_loss(predicted, true_iou)
    if not matched.any():
        return logits.sum() * 0.0, iou_loss
    losses = mask_loss(logits[matched], prompts.targets[matched])
    total = losses[:, 0].mean()
    if ambiguous:
        # The best of three learns; a small share for the others keeps none of them dead.
        rest = losses[:, 1:]
        total = total + 0.45 * rest.min(1).values.mean() + 0.05 * rest.mean()
    return total, iou_loss


# --------------------------------------------------------------------------------------------------
# Evaluation
# --------------------------------------------------------------------------------------------------


@torch.no_grad()
def region_tables(
    sam: Sam,
    family: int,
    scenes: int,
    kinds: Sequence[str] = (FULL_PROMPT,),
    severity: float = 1.0,
    min_area: int = MIN_REGION_AREA,
) -> dict[str, Tensor]:
    """Prompt every region of held-out scenes, coarsely segmented by the simulator.

    Args:
        sam: the model; left in eval mode.
        family: seed of the scenes.
        scenes: how many.
        kinds: keys of `PROMPT_KINDS`.
        severity: of the simulated mistakes.
        min_area: smallest region prompted, in pixels of the 128×128 grid.

    Returns:
        For each kind (R, 6) float32, a row a region: IoU of the coarse region and of the
        output with the target, predicted IoU, class, whether there is a target at all, and its
        area in pixels of the scene.
    """
    sam.eval()
    rows: dict[str, list[Tensor]] = {kind: [] for kind in kinds}
    for index in range(scenes):
        scene = make_scene(family, index, IMAGE_SIZE)
        prompts = make_prompts(
            simulate_coarse(scene, np.random.default_rng((family, index, 1)), severity),
            scene.labels,
            scale=MASK_PROMPT_SCALE,
            threshold=0.0,
            min_area=min_area,
        )
        if prompts is None:
            continue
        embedding = sam.image_encoder(sam.preprocess(scene.image[None].float()))
        area = prompts.targets.flatten(1).sum(1)
        for kind in kinds:
            logits, predicted = predict(sam, embedding, prompts, kind)
            iou = mask_iou(logits, prompts.targets)[:, 0]
            columns = (prompts.coarse_iou, iou, predicted[:, 0], prompts.classes, prompts.matched)
            rows[kind].append(torch.stack([*columns, area], dim=1))
    return {kind: torch.cat(tables) for kind, tables in rows.items()}


def summarize(table: Tensor) -> dict[str, float]:
    """Means over a table of regions.

    Args:
        table: (R, 6) float32 of `region_tables`.

    Returns:
        `regions` with a target, their mean `coarse` and `refined` IoU and their `iou_error`, the
        mean |predicted − true IoU|; `false_positives` without one, and `iou_error_all`, the error
        over both, the true IoU of a false positive being 0.
    """
    coarse, refined, predicted, _, matched, _ = table.unbind(1)
    hit, error = matched > 0, (predicted - refined).abs()
    return {
        "regions": float(hit.sum()),
        "false_positives": float((~hit).sum()),
        "coarse": float(coarse[hit].mean()),
        "refined": float(refined[hit].mean()),
        "iou_error": float(error[hit].mean()),
        "iou_error_all": float(error.mean()),
    }


def print_test_table(sam: Sam) -> None:
    """Print what the model card reports: test scenes by prompt, class, size and severity."""

    def line(name: str, table: Tensor) -> None:
        r = summarize(table)
        print(
            f"{name:24} {r['regions']:7.0f} {r['coarse']:7.3f} {r['refined']:7.3f} "
            f"{r['iou_error']:7.3f} {r['false_positives']:6.0f} {r['iou_error_all']:7.3f}",
            flush=True,
        )

    print(
        f"{'test':24} {'regions':>7} {'coarse':>7} {'refined':>7} {'|dIoU|':>7} {'FP':>6} with FP"
    )
    tables = region_tables(sam, TEST_FAMILY, TEST_SCENES, list(PROMPT_KINDS))
    for kind, table in tables.items():
        line(kind, table)
    full = tables[FULL_PROMPT]
    for label, name in enumerate(CLASS_NAMES):
        line(f"  {name}", full[full[:, 3] == label])
    bounds = (0, 250, 1000, 4000, IMAGE_SIZE**2 + 1)
    for low, high in itertools.pairwise(bounds):
        # False positives have no area, so they stay out of the rows by size.
        chosen = (full[:, 5] >= low) & (full[:, 5] < high) & (full[:, 4] > 0)
        line(f"  area [{low}, {high})", full[chosen])
    milder = region_tables(sam, TEST_FAMILY, TEST_SCENES, severity=0.5)
    line("severity 0.5", milder[FULL_PROMPT])


# --------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------


def learning_rate(step: int, steps: int, peak: float, warmup: int = 150) -> float:
    """Linear warm-up, then cosine down to a hundredth of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    return peak * (0.01 + 0.99 * 0.5 * (1.0 + math.cos(math.pi * progress)))


@torch.no_grad()
def update_average(average: Sam, sam: Sam, step: int, decay: float = 0.998) -> None:
    """Move the averaged weights (and normalization statistics) towards the current ones."""
    rate = 1.0 - min(decay, (1 + step) / (10 + step))
    source = sam.state_dict()
    for name, value in average.state_dict().items():
        if value.is_floating_point():
            value.lerp_(source[name], rate)
        else:
            value.copy_(source[name])


def batches(
    seed: int, start: int, batch: int, limit: int
) -> Iterator[list[tuple[Scene, Prompts, str]]]:
    """Endless training batches; batch k is the same however often training was resumed."""
    kinds = list(PROMPT_KINDS)
    step = start
    while True:
        items: list[tuple[Scene, Prompts, str]] = []
        for index in range(step * batch, (step + 1) * batch):
            rng = np.random.default_rng((TRAIN_FAMILY + seed, index, 1))
            scene = make_scene(TRAIN_FAMILY + seed, index, IMAGE_SIZE)
            prompts = training_prompts(scene, rng, limit)
            if prompts is not None:
                items.append((scene, prompts, str(rng.choice(kinds, p=KIND_WEIGHTS))))
        yield items
        step += 1


def export(sam: Sam, path: Path) -> None:
    """Write the weights in half precision: half the bytes, and no measurable difference."""
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {
        name: value.half().contiguous() if value.is_floating_point() else value
        for name, value in sam.state_dict().items()
    }
    save_file(state, path)
    # safetensors writes for the owner only, and a wheel keeps the mode it finds.
    path.chmod(0o644)


def load(path: Path) -> Sam:
    """The tiny SAM with weights written by `export`, in float32 and eval mode."""
    sam = build_tiny_sam()
    sam.load_state_dict(load_file(path), strict=True)
    return sam.eval()


def train(args: argparse.Namespace) -> Sam:
    """Train and return the averaged model that is best on validation scenes."""
    args.work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    sam, head = build_tiny_sam(), AffinityHead()
    average = copy.deepcopy(sam)
    parameters = [*sam.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.02)
    first, best = 0, -1.0
    last, curve = args.work / "last.pt", args.work / "curve.csv"
    if args.resume and last.exists():
        saved = torch.load(last, weights_only=True)
        for name, part in (("sam", sam), ("head", head), ("average", average)):
            part.load_state_dict(saved[name])
        optimizer.load_state_dict(saved["optimizer"])
        first, best = saved["step"], saved["best"]
    elif curve.exists():
        curve.unlink()
    began, sums, seen = time.perf_counter(), torch.zeros(3), 0
    stream = batches(args.seed, first, args.batch, args.prompts)
    for step in range(first, args.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.lr)
        items = next(stream)
        sam.train()
        images = torch.stack([scene.image for scene, _, _ in items]).float()
        embeddings = sam.image_encoder(sam.preprocess(images))
        auxiliary = head.loss(embeddings, torch.stack([scene.instances for scene, _, _ in items]))
        parts = [
            image_loss(sam, embeddings[k : k + 1], prompts, kind)
            for k, (_, prompts, kind) in enumerate(items)
        ]
        mask_part = torch.stack([mask for mask, _ in parts]).mean()
        iou_part = torch.stack([iou for _, iou in parts]).mean()
        optimizer.zero_grad(set_to_none=True)
        (mask_part + 2.0 * iou_part + auxiliary).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        update_average(average, sam, step)
        sums += torch.stack([mask_part, iou_part, auxiliary]).detach()
        seen += 1
        if (step + 1) % args.eval_every == 0 or step + 1 == args.steps:
            row = {"step": step + 1, "seconds": round(time.perf_counter() - began, 1)}
            names = ("mask_loss", "iou_loss", "affinity_loss")
            row |= dict(zip(names, (sums / seen).tolist(), strict=True))
            tables = region_tables(average, VALIDATION_FAMILY, VALIDATION_SCENES)
            result = summarize(tables[FULL_PROMPT])
            row |= {key: result[key] for key in ("coarse", "refined", "iou_error", "iou_error_all")}
            sums, seen = torch.zeros(3), 0
            fresh = not curve.exists()
            with curve.open("a", newline="") as file:
                writer = csv.DictWriter(file, row)
                if fresh:
                    writer.writeheader()
                writer.writerow(row)
            print("  ".join(f"{k} {v:.4g}" for k, v in row.items()), flush=True)
            if result["refined"] > best:
                best = result["refined"]
                torch.save(average.state_dict(), args.work / "best.pt")
            checkpoint = {"sam": sam, "head": head, "average": average, "optimizer": optimizer}
            state = {name: part.state_dict() for name, part in checkpoint.items()}
            torch.save(state | {"step": step + 1, "best": best}, last)
    average.load_state_dict(torch.load(args.work / "best.pt", weights_only=True))
    return average.eval()


def main() -> None:
    """Command line: see the module's own documentation."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=5000, help="optimizer steps in all")
    parser.add_argument("--batch", type=int, default=3, help="scenes a step")
    parser.add_argument("--prompts", type=int, default=5, help="prompts a scene at most")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and training scenes")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--eval-every", type=int, default=100, help="steps between validations")
    parser.add_argument(
        "--work", type=Path, default=Path("runs/tiny_sam"), help="checkpoints, curve"
    )
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="exported weights")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    parser.add_argument("--eval-only", action="store_true", help="evaluate --out and stop")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    if not args.eval_only:
        export(train(args), args.out)
    print_test_table(load(args.out))


if __name__ == "__main__":
    main()
