"""Trains the demo model: `python -m shared.inference.demo.train --out FOLDER` (a few minutes on two CPU cores).

The weights, their configuration and `metrics.json` (measured on scenes that were not trained on, through the engine,
at the scenes' own size) land in the folder; the ones that ship were made by this script with its defaults.
"""

import argparse
import json
import logging
import math
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from transformers import Mask2FormerConfig

from shared.inference.demo.scenes import Scene, draw_scene
from shared.inference.engine import Engine
from shared.inference.labels import DEMO
from shared.inference.mask2former import SemanticMask2Former
from shared.inference.modes import MODES
from shared.inference.resize import fit_size

CHANNELS = MODES["demo"].channels
ASPECTS = ((4, 3), (16, 9), (1, 1), (3, 4), (3, 2))
FIRST_HELD_OUT_SEED = 1_000_000
"""Training seeds stay below, held-out seeds start here."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Phase:
    """A stretch of training at one input size; small inputs first, because a step on them costs a fraction."""

    steps: int
    batch: int
    input_size: int


def main() -> None:
    """Read the command line, train, save, measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=850, help="in all; not quite half of them on small inputs")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--held-out", type=int, default=60, help="how many unseen scenes to measure on")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.manual_seed(options.seed)
    network = build_network()
    started = time.perf_counter()
    train(network, steps=options.steps, seed=options.seed)
    train_seconds = time.perf_counter() - started
    network.save_pretrained(options.out)
    metrics = measure(options.out, scenes=options.held_out)
    metrics |= {"steps": options.steps, "seed": options.seed, "train_seconds": round(train_seconds)}
    (options.out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    logger.info("mIoU %.4f on %d scenes", metrics["miou"], metrics["scenes"])


def build_network() -> SemanticMask2Former:
    """A Mask2Former of about a million parameters: everything the large one has, narrower and shallower."""
    backbone = {
        "model_type": "swin",
        "embed_dim": 24,
        "depths": [1, 2, 2, 1],
        "num_heads": [1, 2, 4, 8],
        "window_size": 8,
        "mlp_ratio": 2.0,
        "drop_path_rate": 0.0,
        "image_size": 384,
        "out_features": ["stage1", "stage2", "stage3", "stage4"],
    }
    config = Mask2FormerConfig(
        backbone_config=backbone,
        feature_size=64,
        mask_feature_size=64,
        hidden_dim=64,
        encoder_feedforward_dim=128,
        encoder_layers=2,
        dim_feedforward=128,
        decoder_layers=4,
        num_attention_heads=4,
        num_queries=16,
        id2label=dict(enumerate(DEMO.classes[1:])),
        label2id={name: channel for channel, name in enumerate(DEMO.classes[1:])},
    )
    return SemanticMask2Former(config)


def train(network: SemanticMask2Former, *, steps: int, seed: int) -> None:
    """Fit the network to fresh scenes with AdamW at 1e-3, warmed up and then lowered along a cosine."""
    small = steps * 47 // 100
    phases = (Phase(small, batch=8, input_size=128), Phase(steps - small, batch=2, input_size=MODES["demo"].input_size))
    optimiser = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: _learning_rate(step, steps))
    network.train()
    for step, (pixels, channels) in enumerate(_batches(phases, seed)):
        loss = combined_loss(network, pixels, channels)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if step % 20 == 0:
            logger.info("step %d of %d, input %s, loss %.3f", step, steps, tuple(pixels.shape[-2:]), loss.item())


def _learning_rate(step: int, steps: int) -> float:
    warm = min(1.0, (step + 1) / 30)
    return warm * (0.02 + 0.98 * (0.5 + 0.5 * math.cos(math.pi * step / steps)))


def _batches(phases: tuple[Phase, ...], seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Pixels (n, 3, h, w) and channels (n, h, w) of scenes never seen twice; one batch is drawn ahead."""
    rng = np.random.default_rng(seed)
    first = seed * 50_000 % FIRST_HELD_OUT_SEED
    plan = []
    for phase in phases:
        for _ in range(phase.steps):
            plan.append((range(first, first + phase.batch), phase.input_size, ASPECTS[rng.integers(len(ASPECTS))]))
            first += phase.batch
    with ThreadPoolExecutor(max_workers=1) as drawing:
        ahead = drawing.submit(_draw_batch, *plan[0])
        for following in [*plan[1:], plan[0]]:
            batch = ahead.result()
            ahead = drawing.submit(_draw_batch, *following)
            yield batch


def _draw_batch(seeds: range, input_size: int, aspect: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    width, height = fit_size(*aspect, input_size)
    scenes = [draw_scene(seed, width=width, height=height, time_seconds=seed % 20) for seed in seeds]
    images = np.stack([_photograph(scene, seed) for scene, seed in zip(scenes, seeds, strict=True)])
    mode = MODES["demo"]
    pixels = (images / 255 - np.array(mode.mean)) / np.array(mode.std)
    channels = np.stack([scene.labels for scene in scenes]).astype(np.int64) - mode.channel_offset
    return torch.from_numpy(pixels).float().permute(0, 3, 1, 2).contiguous(), torch.from_numpy(channels)


def _photograph(scene: Scene, seed: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """The image as other cameras and encoders might give it: other exposure, contrast and noise."""
    rng = np.random.default_rng((seed, 1))
    image = (scene.image - 127.5) * rng.uniform(0.85, 1.15) + 127.5 + rng.normal(0, 8, 3)
    return np.clip(image + rng.normal(0, rng.uniform(0, 4), image.shape), 0, 255)


def combined_loss(network: SemanticMask2Former, pixels: torch.Tensor, channels: torch.Tensor) -> torch.Tensor:
    """Mask and class losses on the last and every auxiliary prediction, query k always standing for channel k.

    The fixed assignment takes the place of the paper's matching: every class occurs once per image. The combined map
    that post-processing makes of both is scored too, for its borders; alone it would teach nothing at first.
    """
    output = network.model(pixels, output_hidden_states=True)
    truth = functional.one_hot(channels, CHANNELS).permute(0, 3, 1, 2).float()
    present = truth.amax(dim=(2, 3)) > 0
    coarse = functional.interpolate(truth, size=output.masks_queries_logits[-1].shape[-2:], mode="area")
    total = torch.zeros(())
    predictions = list(zip(output.masks_queries_logits, output.transformer_decoder_intermediate_states, strict=True))
    for number, (masks, queries) in enumerate(predictions):
        last = number == len(predictions) - 1
        classes = network.class_predictor(queries.transpose(0, 1))
        own = masks[:, :CHANNELS]
        if last:
            own = functional.interpolate(own, size=truth.shape[-2:], mode="bilinear")
        loss = _mask_loss(own, truth if last else coarse, present) + 0.5 * _class_loss(classes, present)
        total = total + (loss + _map_loss(own, classes, channels) if last else 0.3 * loss)
    return total


def _mask_loss(masks: torch.Tensor, truth: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
    pixelwise = functional.binary_cross_entropy_with_logits(masks, truth)
    chance = masks.sigmoid()
    overlap = (chance * truth).sum(dim=(2, 3))
    dice = 1 - (2 * overlap + 1) / (chance.sum(dim=(2, 3)) + truth.sum(dim=(2, 3)) + 1)
    return 5 * pixelwise + 2 * dice[present].mean()


def _map_loss(masks: torch.Tensor, classes: torch.Tensor, channels: torch.Tensor) -> torch.Tensor:
    chances = classes.softmax(dim=-1)[:, :CHANNELS, :-1]
    scores = torch.einsum("nqc,nqhw->nchw", chances, masks.sigmoid()) + 1e-4
    return functional.nll_loss((scores / scores.sum(dim=1, keepdim=True)).log(), channels)


def _class_loss(classes: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
    targets = torch.full(classes.shape[:2], CHANNELS)
    targets[:, :CHANNELS] = torch.where(present, torch.arange(CHANNELS), CHANNELS)
    weights = torch.ones(CHANNELS + 1)
    weights[CHANNELS] = 0.1
    return functional.cross_entropy(classes.flatten(0, 1), targets.flatten(), weight=weights)


def measure(
    folder: Path, *, scenes: int, sizes: tuple[tuple[int, int], ...] = ((640, 480), (960, 540), (480, 640))
) -> dict[str, object]:
    """The model's mean IoU on unseen scenes, from image to mask at the scenes' own size through the engine."""
    engine = Engine(device="cpu", sources={"demo": (str(folder), None)}, offline=True)
    confusion = np.zeros((256, 256), dtype=np.int64)
    for number in range(scenes):
        width, height = sizes[number % len(sizes)]
        scene = draw_scene(FIRST_HELD_OUT_SEED + number, width=width, height=height)
        mask = engine.segment(scene.image, "demo").mask
        pairs = scene.labels.astype(np.int64) * 256 + mask
        confusion += np.bincount(pairs.ravel(), minlength=65536).reshape(256, 256)
    overlap = np.diag(confusion).astype(float)
    union = confusion.sum(axis=0) + confusion.sum(axis=1) - overlap
    ious = {DEMO.classes[k]: round(float(overlap[k] / union[k]), 4) for k in range(1, len(DEMO.classes)) if union[k]}
    return {
        "miou": round(sum(ious.values()) / len(ious), 4),
        "iou": ious,
        "pixel_accuracy": round(float(overlap.sum() / confusion.sum()), 4),
        "scenes": scenes,
        "sizes": [list(size) for size in sizes],
        "first_seed": FIRST_HELD_OUT_SEED,
    }


if __name__ == "__main__":
    main()
