"""One packet is destroyed: what rests on it has no image, all else has its own, and chunks make no difference."""

from pathlib import Path

import av
import numpy as np
import pytest

from shared.inference.recording import Index
from tests.recordings import FRAMES, look_alike, numbers, packet_places, probe_all, read_all, read_number
from tests.unit.inference.test_frames import KINDS, encode_kinds

LENGTHS = (1, 7, 10**6)
PICTURES = ("keyframe", "anchor", "b-frame")
WITHOUT_B_FRAMES = ("vp8.webm", "vp9.webm", "av1.mp4", "mjpeg.avi", "prores.mov")
ONE_KEYFRAME = ("h264-single-key.mp4", "h264-refresh.mp4")
UNTIMED = [("mpeg2.mpg", "keyframe"), ("mpeg2.mpg", "anchor"), ("mpeg2.mpg", "b-frame"), ("h264-closed.avi", "b-frame")]
"""Where containers do not say when each frame is shown, and the lost one could be any of a few."""
CASES = [
    (name, picture)
    for name in KINDS
    for picture in PICTURES
    if not (picture == "b-frame" and name in WITHOUT_B_FRAMES)
    and not (picture == "keyframe" and name in ONE_KEYFRAME)
    and (name, picture) not in UNTIMED
]


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("damaged")
    encode_kinds(folder)
    return folder


def choose_packet(index: Index, picture: str) -> int:
    """A keyframe in the middle, or after the one before it a packet shown after all that came, or before some."""
    keys = index.keyframes.number
    if picture == "keyframe":
        return int(keys[len(keys) // 2])
    shown = index.positions
    latest = np.maximum.accumulate(shown)
    after = int(keys[1 if len(keys) > 1 else 0]) + 3
    matching = (shown == latest) if picture == "anchor" else (shown >= 0) & (shown < latest)
    return int(after + np.flatnonzero(matching[after:])[0])


def destroy(path: Path, packet: int, *, intact: int = 0) -> bytes:
    """The file with all bytes of a packet but the first `intact` overwritten."""
    data = np.frombuffer(path.read_bytes(), np.uint8).copy()
    places = find_payload(path, packet)
    data[places[intact:]] = 0xFF
    return data.tobytes()


def find_payload(path: Path, packet: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Where the bytes of a packet lie; containers put their own between and before them."""
    data = path.read_bytes()
    if path.suffix != ".ts":
        with av.open(path) as container:
            content = [bytes(packet) for packet in container.demux(video=0) if packet.size][packet]
        place = data.find(content)
        assert place >= 0
        return place + np.arange(len(content))
    bounds = [place for place, _ in packet_places(path)] + [len(data)]
    video = data[bounds[0] + 1 : bounds[0] + 3]
    places: list[int] = []
    for at in range(bounds[packet], bounds[packet + 1], 188):
        begins = bool(data[at + 1] & 0x40)
        if (data[at + 1] & 0x1F, data[at + 2]) != (video[0] & 0x1F, video[1]):
            continue
        first = at + 4 + (1 + data[at + 4] if data[at + 3] & 0x20 else 0)
        # The header of the packet of an elementary stream, which says its times.
        places += range(first + (9 + data[first + 8] if begins else 0), at + 188)
    return np.array(places)


@pytest.mark.parametrize(("name", "picture"), CASES)
def test_a_destroyed_packet_costs_what_rests_on_it_and_nothing_else(recordings: Path, name: str, picture: str) -> None:
    sound, packet, damaged = destroy_one(recordings / name, picture)
    shown = {frame.pts: frame for frame in read_all(recordings / name, sound)}
    frames = read_all(damaged, probe_all(damaged))
    bad = {shown[frame.pts].number for frame in frames if frame.image is None}
    # A container may have lost the packet altogether; the others keep their times.
    gone = set(range(FRAMES)) - {shown[frame.pts].number for frame in frames}
    assert len(gone) <= 1
    assert int(sound.positions[packet]) in bad | gone
    assert bad | gone <= resting_on(sound, packet)
    for frame in frames:
        assert frame.image is None or read_number(frame.image) == shown[frame.pts].number
        assert frame.image is None or look_alike(frame, shown[frame.pts])


@pytest.mark.parametrize(("name", "picture"), CASES + UNTIMED)
def test_which_frames_are_bad_does_not_depend_on_the_chunks(recordings: Path, name: str, picture: str) -> None:
    _, _, damaged = destroy_one(recordings / name, picture)
    index = probe_all(damaged)
    whole = read_all(damaged, index)
    # Some containers take what is destroyed for the end of the packet before it.
    assert len(whole) < FRAMES or any(frame.image is None for frame in whole)
    for length in LENGTHS:
        frames = read_all(damaged, index, frames=length)
        assert [frame.pts for frame in frames] == index.times.tolist()
        assert [frame.problem for frame in frames] == [frame.problem for frame in whole]
        for frame, other in zip(frames, whole, strict=True):
            assert look_alike(frame, other)


@pytest.mark.parametrize("name", ["h264-closed.mov", "h264-open.mp4", "hevc-open.mp4", "mpeg4.avi", "mpeg2-fields.mp4"])
def test_a_damaged_frame_that_no_other_is_made_from_is_lost_alone(recordings: Path, name: str) -> None:
    index = probe_all(recordings / name)
    after = int(index.keyframes.number[1]) + 2
    shown, latest = index.positions, np.maximum.accumulate(index.positions)
    # The last B-frame before an anchor.
    packet = after + int(np.flatnonzero((shown[after:-1] < latest[after:-1]) & (shown == latest)[after + 1 :])[0])
    damaged = destroy(recordings / name, packet, intact=8)
    frames = read_all(damaged, probe_all(damaged))
    assert [frame.number for frame in frames if frame.image is None] == [int(shown[packet])]
    assert all(number in (None, place) for place, number in enumerate(numbers(frames)))


def destroy_one(path: Path, picture: str) -> tuple[Index, int, bytes]:
    sound = probe_all(path)
    packet = choose_packet(sound, picture)
    return sound, packet, destroy(path, packet)


def resting_on(index: Index, packet: int) -> set[int]:
    """The frames that a packet may be needed for, by the keyframes alone."""
    keys = [*index.keyframes.number.tolist(), 10**6]
    following = next(row for row, number in enumerate(keys) if number > packet)
    # The packet before may be taken to be longer than it is; those after the next keyframe may be shown before it.
    return {
        frame
        for frame, number in enumerate(index.packets.tolist())
        if packet - 1 <= number < keys[following]
        or (number >= keys[following] and index.times[frame] < index.keyframes.pts[following])
    }
