"""Labels by one fused kernel, on CUDA: nothing of the image's size is kept but its labels.

A program takes a stretch of one row of pixels. For each query it reads the four samples around every pixel,
interpolates, takes the sigmoid, and multiplies into the scores of all channels, which stay in registers; then it
writes the best channel. Import this only where there is Triton.
"""

import torch
import triton
import triton.language as tl

from shared.inference.sampling import axis

PIXELS = 64
"""Pixels of one program: with up to 256 channels their scores still fit the registers."""
QUERIES = 16
"""Queries of one step, the least depth a matrix product takes."""


@triton.jit  # type: ignore[untyped-decorator]  # Triton has no types
def _label_kernel(  # type: ignore[no-untyped-def]
    planes,
    weights,
    channels_out,
    confidence_out,
    row_lower,
    row_upper,
    row_weight,
    column_lower,
    column_upper,
    column_weight,
    width,
    sample_columns,
    plane_size,
    values,
    count,
    with_queries: tl.constexpr,
    with_confidence: tl.constexpr,
    pixels: tl.constexpr,
    depth: tl.constexpr,
    width_of_scores: tl.constexpr,
):
    row = tl.program_id(1)
    column = tl.program_id(0) * pixels + tl.arange(0, pixels)
    inside = column < width
    left = tl.load(column_lower + column, mask=inside, other=0)
    right = tl.load(column_upper + column, mask=inside, other=0)
    across = tl.load(column_weight + column, mask=inside, other=0.0)
    above = tl.load(row_lower + row) * sample_columns
    below = tl.load(row_upper + row) * sample_columns
    down = tl.load(row_weight + row)
    numbers = tl.arange(0, width_of_scores)
    if with_queries:
        scores = tl.zeros((pixels, width_of_scores), dtype=tl.float32)
        for first in range(0, values, depth):
            step = first + tl.arange(0, depth)
            some = step < values
            plane = planes + step.to(tl.int64)[None, :] * plane_size
            wanted = inside[:, None] & some[None, :]
            a = tl.load(plane + (above + left)[:, None], mask=wanted, other=0.0).to(tl.float32)
            b = tl.load(plane + (above + right)[:, None], mask=wanted, other=0.0).to(tl.float32)
            c = tl.load(plane + (below + left)[:, None], mask=wanted, other=0.0).to(tl.float32)
            d = tl.load(plane + (below + right)[:, None], mask=wanted, other=0.0).to(tl.float32)
            top = a + (b - a) * across[:, None]
            bottom = c + (d - c) * across[:, None]
            chance = tl.sigmoid(top + (bottom - top) * down)
            taken = some[:, None] & (numbers < count)[None, :]
            weight = tl.load(weights + step[:, None] * count + numbers[None, :], mask=taken, other=0.0)
            # Full precision: TF32 would decide near-ties otherwise than the CPU does.
            scores += tl.dot(chance, weight, input_precision="ieee")
    else:
        plane = planes + numbers.to(tl.int64)[None, :] * plane_size
        wanted = inside[:, None] & (numbers < count)[None, :]
        a = tl.load(plane + (above + left)[:, None], mask=wanted, other=0.0).to(tl.float32)
        b = tl.load(plane + (above + right)[:, None], mask=wanted, other=0.0).to(tl.float32)
        c = tl.load(plane + (below + left)[:, None], mask=wanted, other=0.0).to(tl.float32)
        d = tl.load(plane + (below + right)[:, None], mask=wanted, other=0.0).to(tl.float32)
        top = a + (b - a) * across[:, None]
        bottom = c + (d - c) * across[:, None]
        scores = top + (bottom - top) * down
    scores = tl.where((numbers < count)[None, :], scores, float("-inf"))
    winner = tl.argmax(scores, axis=1, tie_break_left=True)
    place = row.to(tl.int64) * width + column
    tl.store(channels_out + place, winner.to(tl.uint8), mask=inside)
    if with_confidence:
        best = tl.max(scores, axis=1)
        if with_queries:
            total = tl.sum(tl.where((numbers < count)[None, :], scores, 0.0), axis=1)
            share = best / tl.maximum(total, 1e-37)
        else:
            share = 1.0 / tl.sum(tl.exp(scores - best[:, None]), axis=1)
        tl.store(confidence_out + place, (share * 255.0 + 0.5).to(tl.uint8), mask=inside)


def label_fused(
    planes: torch.Tensor, weights: torch.Tensor | None, *, size: tuple[int, int], confidence: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The winning channel and, if wanted, its confidence, uint8 (height, width) each, on the device of `planes`.

    `planes` is (V, h, w) in any floating dtype, at most 256 values without `weights`; `weights` (queries, channels)
    float32 make them mask logits. `size` is (width, height).
    """
    width, height = size
    values, sample_rows, sample_columns = planes.shape
    count = values if weights is None else weights.shape[1]
    planes = planes.contiguous()
    rows, columns = axis(height, sample_rows), axis(width, sample_columns)
    taps = [
        torch.from_numpy(array).to(planes.device)
        for line in (rows, columns)
        for array in (line.lower, line.upper, line.weight)
    ]
    channels = torch.empty((height, width), dtype=torch.uint8, device=planes.device)
    shares = torch.empty_like(channels) if confidence else None
    _label_kernel[(triton.cdiv(width, PIXELS), height)](
        planes,
        planes if weights is None else weights.contiguous(),
        channels,
        channels if shares is None else shares,
        *taps,
        width,
        sample_columns,
        sample_rows * sample_columns,
        values,
        count,
        with_queries=weights is not None,
        with_confidence=confidence,
        pixels=PIXELS,
        depth=QUERIES,
        width_of_scores=max(16, triton.next_power_of_2(count)),
        num_warps=8,
    )
    return channels, shares
