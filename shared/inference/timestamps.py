"""When frames are shown: presentation timestamps (pts) that are complete and ascend, whatever the container says.

AVI and MPEG program streams leave times out, recordings that were joined begin again at 0, and some give two frames
one time. All of it is repaired here, from the packets' times alone, and told.
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Times = NDArray[np.int64]
Flags = NDArray[np.bool_]

MISSING = np.iinfo(np.int64).min
"""FFmpeg's own sign for a time that is not there."""


@dataclass(frozen=True)
class PacketTable:
    """What is known of the packets of a stream, in the order in which they are decoded: arrays (P,), times in ticks."""

    pts: Times
    dts: Times
    key: Flags
    shown: Flags
    """False for what an edit list cuts away and for pictures that only others are made from."""


def fill_decoding_times(dts: Times, pts: Times) -> Times:
    """`dts` without gaps: a missing one is a step after the one before, and they never go back within a gap."""
    if not (dts == MISSING).any():
        return dts
    known = np.flatnonzero(dts != MISSING)
    step = typical_step(dts[known])
    if not len(known):
        first = int(pts[pts != MISSING].min()) if (pts != MISSING).any() else 0
        return first + step * np.arange(len(dts), dtype=np.int64)
    filled = dts.copy()
    before = np.maximum(np.searchsorted(known, np.arange(len(dts)), side="right") - 1, 0)
    anchor = known[before]
    filled[:] = dts[anchor] + step * (np.arange(len(dts)) - anchor)
    return filled


def fill_from_reordering(pts: Times, dts: Times, unreadable: NDArray[np.int64]) -> Times:
    """`pts` as MPEG-1, -2 and -4 define them, where a container gives them for B-frames alone.

    A B-frame is shown when it is decoded; any other is shown when the next such one is decoded. `unreadable` are the
    numbers, ascending, of packets that do not say what they are: B-frames, unless as many as usual came before.
    """
    if len(unreadable):
        pts = pts.copy()
        anchors = (pts == MISSING) | (pts != dts)
        usual = int(np.median(np.diff(np.flatnonzero(anchors)))) if anchors.sum() > 1 else 1
        for number in unreadable.tolist():
            # B-frames are made from two others.
            anchors[number] = anchors[:number].sum() < 2 or not anchors[max(0, number - usual + 1) : number].any()
            pts[number] = MISSING if anchors[number] else dts[number]
    missing = pts == MISSING
    if not missing.any():
        return pts
    anchors = np.flatnonzero(missing | (pts != dts))
    following = np.append(dts[anchors[1:]], dts[-1] + typical_step(dts))
    filled = pts.copy()
    lacking = missing[anchors]
    filled[anchors[lacking]] = following[lacking]
    return filled


def join_parts(table: PacketTable) -> tuple[Times, int]:
    """`pts` of a recording whose clock was set back, moved so that each part follows the one before; how many did.

    A keyframe comes after all that was decoded before it, so one with an earlier time begins a part.
    """
    latest = np.maximum.accumulate(table.pts)
    starts = np.flatnonzero(table.key[1:] & (table.pts[1:] < latest[:-1])) + 1
    if not len(starts):
        return table.pts, 0
    pts = table.pts.copy()
    bounds = [0, *starts.tolist(), len(pts)]
    step = max(typical_step(np.sort(pts[a:b])) for a, b in pairwise(bounds))
    end = int(pts[: bounds[1]].max())
    joined = 0
    for a, b in pairwise(bounds[1:]):
        if table.pts[a] <= end:
            pts[a:b] += end + step - int(pts[a:b].min())
            joined += 1
        end = int(pts[a:b].max())
    return pts, joined


def order_frames(table: PacketTable) -> tuple[Times, NDArray[np.int64], int]:
    """The times of the frames, ascending, the number of each one's packet, and how many shared their time.

    Of frames with the same time the one decoded last is what a viewer sees; the others are left out.
    """
    shown = np.flatnonzero(table.shown)
    order = shown[np.argsort(table.pts[shown], kind="stable")]
    times = table.pts[order]
    last = np.append(times[1:] != times[:-1], True) if len(times) else np.zeros(0, bool)
    return times[last], order[last], int(len(order) - last.sum())


def typical_step(times: Times) -> int:
    """The median distance of ascending times, at least 1."""
    if len(times) < 2:
        return 1
    return max(1, int(np.median(np.diff(times))))
