"""Labels by cells, on a CPU: most of an image is decided at the resolution of the model's output.

A cell is the pixels between the same four samples; a block is BLOCK × BLOCK cells. Where the range of the values in a
block lets one channel win alone, all its pixels are labelled at once; else its cells are tried likewise, by the values
at their own corners; only what is left is computed pixel by pixel, with the channels that can still win. The result is
that of the whole computation, because the bounds are (see scores).
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from shared.inference.sampling import MAX_RUN, Axis, axis
from shared.inference.scores import Bytes, Flags, Indices, Scores

BLOCK = 4
"""Cells along one side of a block."""
BAND_BYTES = 2 * 2**20
"""About how much of the model's output is looked at together: it should stay in the cache."""
CHUNK_BYTES = 1 * 2**20
"""About how much the interpolated values of one step may take, for the same reason."""
MIN_CELL_PIXELS = 6
"""Smaller cells are computed straight away: judging one costs as much as four of its pixels."""
PROBES = 64
"""Cells of a band judged first, to see whether judging the others would pay."""


Number = TypeVar("Number", bound=np.generic)


@dataclass(frozen=True)
class _Band:
    """A few rows of cells: which of the runs of the rows, over samples so many columns wide."""

    rows: Axis
    columns: Axis
    runs: range
    sample_columns: int

    @property
    def top(self) -> int:
        """The first row of samples it touches."""
        return int(self.rows.lower[self.rows.starts[self.runs.start]])

    @property
    def bottom(self) -> int:
        """The last row of samples it touches."""
        return int(self.rows.upper[self.rows.starts[self.runs.stop] - 1])


@dataclass(frozen=True)
class _Canvas:
    """What is being painted: uint8 (height, width) each; `confidence` only where it is asked for."""

    channels: Bytes
    confidence: Bytes | None


def label_cells(
    planes: torch.Tensor, scores: Scores, *, size: tuple[int, int], checkpoint: Callable[[], None]
) -> tuple[Bytes, Bytes | None]:
    """The winning channel and, if the scores have one, its confidence, uint8 (height, width) each.

    `planes` is (V, h, w) on the CPU, `size` (width, height). `checkpoint` is called between bands and may raise to
    stop.
    """
    width, height = size
    rows, columns = axis(height, planes.shape[1]), axis(width, planes.shape[2])
    canvas = _Canvas(
        channels=np.empty((height, width), dtype=np.uint8),
        confidence=np.empty((height, width), dtype=np.uint8) if scores.confidence else None,
    )
    bands = _bands(planes, rows, columns)
    checkpoint()
    with _single_threaded_workers() as workers:
        try:
            for done in as_completed([workers.submit(_paint, planes, band, scores, canvas) for band in bands]):
                done.result()
                checkpoint()
        except BaseException:
            workers.shutdown(wait=True, cancel_futures=True)
            raise
    return canvas.channels, canvas.confidence


@contextmanager
def _single_threaded_workers() -> Iterator[ThreadPoolExecutor]:
    """As many threads as torch may use, in each of which torch uses one.

    The steps are short: with torch's own threads, which wait for each other after every one of them, a busy machine
    takes up to ten times as long.
    """
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(threads, "cells", initializer=torch.set_num_threads, initargs=(1,)) as workers:
        try:
            yield workers
        finally:
            # The setting is each thread's own, but threads yet to come inherit the latest.
            torch.set_num_threads(threads)


def _bands(planes: torch.Tensor, rows: Axis, columns: Axis) -> list[_Band]:
    values, sample_rows, sample_columns = planes.shape
    bytes_per_run = 4 * values * sample_columns * max(1.0, sample_rows / rows.runs)
    step = max(1, int(BAND_BYTES / bytes_per_run / BLOCK)) * BLOCK
    starts = range(0, rows.runs, step)
    return [_Band(rows, columns, range(start, min(start + step, rows.runs)), sample_columns) for start in starts]


@torch.inference_mode()
def _paint(planes: torch.Tensor, band: _Band, scores: Scores, canvas: _Canvas) -> None:
    samples = _samples(planes, band)
    low, high = _block_ranges(band, samples)
    blocks = (low.shape[0], low.shape[1])
    verdict = scores.judge_range(low.flatten(0, 1), high.flatten(0, 1))
    channel, confidence = (_to_cells(field, blocks, band) for field in (verdict.channel, verdict.confidence))
    block = _to_cells(np.arange(len(verdict.channel)), blocks, band)
    cells, may_win = np.stack(np.nonzero(~verdict.certain[block]), axis=1), verdict.may_win
    if len(cells):
        owner = block[cells[:, 0], cells[:, 1]]
        # Neighbours are judged together, as they have the same few channels to choose from.
        order = owner.argsort(kind="stable")
        cells, may_win = _judge_cells(samples, band, scores, cells[order], may_win[owner[order]], channel, confidence)
    _magnify(channel, band, canvas.channels)
    if canvas.confidence is not None:
        _magnify(confidence, band, canvas.confidence)
    for group in _of_equal_shape(band, cells):
        _paint_pixels(samples, band, scores, cells[group], may_win[group], canvas)


def _to_cells(field: NDArray[Number], blocks: tuple[int, int], band: _Band) -> NDArray[Number]:
    """What holds for each block, for each of its cells: (cells down, cells across)."""
    repeated = field.reshape(blocks).repeat(BLOCK, axis=0).repeat(BLOCK, axis=1)
    return np.ascontiguousarray(repeated[: len(band.runs), : band.columns.runs])


def _samples(planes: torch.Tensor, band: _Band) -> torch.Tensor:
    """The samples a band touches, (samples, V), row after row."""
    part = planes[:, band.top : band.bottom + 1].to(torch.float32).contiguous()
    # Turned as a plain matrix: torch does that several times faster than a strided view.
    return part.view(len(part), -1).T.contiguous()


def _block_ranges(band: _Band, samples: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The lowest and the highest value in every block: (blocks down, blocks across, V) each."""
    grid = samples.view(-1, band.sample_columns, samples.shape[1])
    low, high = grid, grid
    lines = ((band.rows, band.runs, band.top), (band.columns, range(band.columns.runs), 0))
    for dim, (line, runs, origin) in enumerate(lines):
        starts = line.starts[runs.start : runs.stop : BLOCK]
        ends = line.starts[np.minimum(np.arange(runs.start, runs.stop, BLOCK) + BLOCK, runs.stop)]
        first, last = line.lower[starts] - origin, line.upper[ends - 1] - origin
        low = _fold(torch.minimum, low, dim, first, last)
        high = _fold(torch.maximum, high, dim, first, last)
    return low, high


def _fold(
    combine: Callable[..., torch.Tensor], grid: torch.Tensor, dim: int, first: Indices, last: Indices
) -> torch.Tensor:
    """Combine the slices of one dimension from `first` to `last`, both included, for each pair of them."""
    folded = grid.index_select(dim, torch.from_numpy(first))
    for offset in range(1, int((last - first).max()) + 1):
        combine(folded, grid.index_select(dim, torch.from_numpy(np.minimum(first + offset, last))), out=folded)
    return folded


def _judge_cells(
    samples: torch.Tensor,
    band: _Band,
    scores: Scores,
    cells: Indices,
    may_win: Flags,
    channel: Bytes,
    confidence: Bytes,
) -> tuple[Indices, Flags]:
    """Judge cells (cells, 2) by their corner pixels, write down what is certain, and return the others."""
    heights, widths = _shapes(band, cells)
    pixels = (heights * widths).mean()
    if pixels < MIN_CELL_PIXELS:
        return cells, may_win
    if len(cells) > 2 * PROBES:
        probes = cells[:: len(cells) // PROBES]
        verdict = scores.judge_corners(_interpolate(samples, band, *_corner_pixels(band, probes)))
        if verdict.certain.mean() * pixels < MIN_CELL_PIXELS:
            return cells, may_win
    left = []
    for part in _chunks(len(cells), 4 * samples.shape[1]):
        narrowed, values = scores.narrow(np.logical_or.reduce(may_win[part]))
        verdict = narrowed.judge_corners(_interpolate(samples, band, *_corner_pixels(band, cells[part]), values))
        row, column = cells[part][verdict.certain].T
        channel[row, column] = verdict.channel[verdict.certain]
        confidence[row, column] = verdict.confidence[verdict.certain]
        left.append((cells[part][~verdict.certain], verdict.may_win[~verdict.certain]))
    return np.concatenate([part for part, _ in left]), np.concatenate([part for _, part in left])


def _shapes(band: _Band, cells: Indices) -> tuple[Indices, Indices]:
    """How many pixel rows and columns each cell has."""
    return np.diff(band.rows.starts)[cells[:, 0] + band.runs.start], np.diff(band.columns.starts)[cells[:, 1]]


def _chunks(count: int, floats_each: int) -> Iterator[slice]:
    step = max(1, CHUNK_BYTES // (4 * floats_each))
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))


def _corner_pixels(band: _Band, cells: Indices) -> tuple[Indices, Indices]:
    """The first and last pixel row, and column, of each cell: (cells, 2) both."""
    rows, columns = cells[:, 0] + band.runs.start, cells[:, 1]
    return (
        np.stack([band.rows.starts[rows], band.rows.starts[rows + 1] - 1], axis=1),
        np.stack([band.columns.starts[columns], band.columns.starts[columns + 1] - 1], axis=1),
    )


def _interpolate(
    samples: torch.Tensor, band: _Band, rows: Indices, columns: Indices, values: torch.Tensor | None = None
) -> torch.Tensor:
    """The values where m pixel rows cross n pixel columns of each cell, (cells, m × n, V); only `values`, if given."""
    above, below = ((side[rows[:, 0]] - band.top) * band.sample_columns for side in (band.rows.lower, band.rows.upper))
    left, right = band.columns.lower[columns[:, 0]], band.columns.upper[columns[:, 0]]
    index = np.stack([above + left, above + right, below + left, below + right], axis=1)
    corners = samples.index_select(0, torch.from_numpy(index.ravel()))
    if values is not None:
        corners = corners.index_select(1, values)
    down, across = band.rows.weight[rows], band.columns.weight[columns]
    down, across = np.stack([1 - down, down], axis=2), np.stack([1 - across, across], axis=2)
    weights = down[:, :, None, :, None] * across[:, None, :, None, :]
    return torch.bmm(torch.from_numpy(weights.reshape(len(index), -1, 4)), corners.view(len(index), 4, -1))


def _magnify(cells: Bytes, band: _Band, plane: Bytes) -> None:
    """Paint every cell of a band in one value."""
    starts = band.rows.starts[band.runs.start : band.runs.stop + 1]
    wide = cells.repeat(np.diff(band.columns.starts), axis=1)
    np.take(wide, np.repeat(np.arange(len(cells)), np.diff(starts)), axis=0, out=plane[starts[0] : starts[-1]])


def _of_equal_shape(band: _Band, cells: Indices) -> Iterator[Indices]:
    """Split cells (cells, 2) into groups with as many pixel rows and columns each."""
    heights, widths = _shapes(band, cells)
    shape = heights * (MAX_RUN + 1) + widths
    for value in np.unique(shape):
        yield np.flatnonzero(shape == value)


def _paint_pixels(
    samples: torch.Tensor, band: _Band, scores: Scores, cells: Indices, may_win: Flags, canvas: _Canvas
) -> None:
    """Compute every pixel of cells (cells, 2) of equal shape."""
    all_rows, all_columns = _corner_pixels(band, cells)
    down, across = int(np.ptp(all_rows[0])) + 1, int(np.ptp(all_columns[0])) + 1
    for part in _chunks(len(cells), samples.shape[1] * down * across):
        rows, columns = all_rows[part, :1] + np.arange(down), all_columns[part, :1] + np.arange(across)
        narrowed, values = scores.narrow(np.logical_or.reduce(may_win[part]))
        points = _interpolate(samples, band, rows, columns, values).flatten(0, 1)
        channel, confidence = narrowed.judge_points(points)
        place = (rows[:, :, None] * canvas.channels.shape[1] + columns[:, None, :]).ravel()
        canvas.channels.reshape(-1)[place] = channel
        if canvas.confidence is not None:
            canvas.confidence.reshape(-1)[place] = confidence
