"""The CUDA kernel without CUDA: Triton's interpreter runs it on the CPU, where it must agree with the cells."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
# In a process of its own, because Triton reads the variable when it is first imported.
PROGRAM = """
import numpy as np
from bench.logits import random_pixels, random_queries, structured_queries
from shared.inference.postprocess import QueryLogits, label
from shared.inference.triton_masks import label_fused
for prediction in (
    structured_queries(9, 14, queries=20, active=5, channels=30),
    random_queries(3, 2, queries=5, channels=3),
    random_pixels(4, 6, channels=21),
):
    planes, weights = (
        (prediction.masks, prediction.classes.softmax(dim=-1)[:, :-1])
        if isinstance(prediction, QueryLogits)
        else (prediction.logits, None)
    )
    for size in ((70, 4), (1, 3)):
        expected = label(prediction, size=size, channel_offset=0, confidence=True)
        channels, shares = label_fused(planes, weights, size=size, confidence=True)
        assert (channels.numpy() == expected.mask).all()
        assert np.abs(shares.numpy().astype(int) - expected.confidence.astype(int)).max() <= 1
        assert (label_fused(planes, weights, size=size, confidence=False)[0] == channels).all()
"""


def test_the_kernel_gives_the_labels_of_the_cpu() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
