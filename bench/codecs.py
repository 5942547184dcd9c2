"""Masks as PNG and as FFV1: bytes, and time to encode and decode, of our way and of others.

`python -m bench codecs [--json] [--repeats N] [--frames N] [SIZE …]`, where SIZE is a side or WIDTHxHEIGHT. The ways
take turns, frame by frame, so what else the machine does meets them alike; times are medians, ratios are the median of
those within a turn. Every way must give the mask back bit for bit. FFV1 rows are the codec alone, except "file".
"""

import argparse
import io
import json
import platform
import statistics
import struct
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from pathlib import Path

import av
import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from bench.masks import Size, make_logits
from shared.inference.demo.scenes import draw_scene
from shared.inference.device import describe_device
from shared.inference.mask_video import MaskVideoWriter, read_masks
from shared.inference.masks import decode_mask, encode_mask
from shared.inference.postprocess import label

Mask = NDArray[np.uint8]
Row = dict[str, float | str]

SIZES: tuple[Size, ...] = ((512, 512), (1024, 1024), (1920, 1080), (3840, 2160))
SECONDS_APART = 0.2
FILE_ROUNDS = 8
"""How often a file goes through the frames, as opening it is no matter of one frame."""


@dataclass(frozen=True)
class Way:
    encode: Callable[[Mask], bytes]
    decode: Callable[[bytes], Mask]


def label_frames(size: Size, count: int) -> list[Mask]:
    """What a model gives: about 20 classes with wavy, ragged borders, from mask logits that slide sideways."""
    logits = make_logits("structured", size, torch.device("cpu"))
    moved = [replace(logits, masks=logits.masks.roll(3 * number, dims=-1)) for number in range(count)]
    return [label(each, size=size, channel_offset=0).mask for each in moved]


def draw_frames(size: Size, count: int) -> list[Mask]:
    """The demo's landscapes: 10 classes with clean outlines, of which cars, clouds and the sun move."""
    moments = (SECONDS_APART * number for number in range(count))
    return [draw_scene(3, width=size[0], height=size[1], time_seconds=moment).labels for moment in moments]


INPUTS = {"model": label_frames, "drawn": draw_frames}


def pack_png(mask: Mask, *, up: bool, level: int, strategy: int, memory: int) -> bytes:
    """As masks.encode_mask, with its choices open."""
    rows = np.zeros((mask.shape[0], mask.shape[1] + 1), dtype=np.uint8)
    rows[:, 1:] = mask
    if up:
        rows[:, 0] = 2
        np.subtract(mask[1:], mask[:-1], out=rows[1:, 1:])
    packer = zlib.compressobj(level=level, memLevel=memory, strategy=strategy)
    data = packer.compress(rows.data) + packer.flush()
    header = struct.pack(">IIBBBBB", *mask.shape[::-1], 8, 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", data), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )


def save_with_pillow(mask: Mask, *, compress_level: int = 6, optimize: bool = False) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(mask).save(buffer, "PNG", compress_level=compress_level, optimize=optimize)
    return buffer.getvalue()


def save_with_opencv(mask: Mask, *parameters: int) -> bytes:
    _, data = cv2.imencode(".png", mask, parameters)
    return data.tobytes()


class Ffv1:
    """An encoder and a decoder that stay open, with the options given; packets without a container."""

    def __init__(self, size: Size, *, threads: int = 1, **changed: str) -> None:
        options = {"level": "3", "g": "1", "coder": "rice", "context": "0", "slicecrc": "1", "slices": "4", **changed}
        self._encoder = av.CodecContext.create("ffv1", "w")
        self._decoder = av.CodecContext.create("ffv1", "r")
        for context in (self._encoder, self._decoder):
            context.width, context.height = size
            context.thread_type, context.thread_count = av.codec.context.ThreadType.SLICE, threads
        self._encoder.pix_fmt, self._encoder.time_base = "gray", Fraction(1, 25)
        self._encoder.options = options
        self._encoder.open()
        self._decoder.extradata = self._encoder.extradata

    def encode(self, mask: Mask) -> bytes:
        [packet] = self._encoder.encode(av.VideoFrame.from_ndarray(mask, format="gray"))
        return bytes(packet)

    def decode(self, data: bytes) -> Mask:
        [frame] = self._decoder.decode(av.Packet(data))
        return frame.to_ndarray().astype(np.uint8, copy=False)


def list_png_ways() -> dict[str, Way]:
    rle, default = zlib.Z_RLE, zlib.Z_DEFAULT_STRATEGY
    encoders: dict[str, Callable[[Mask], bytes]] = {
        "ours": encode_mask,
        "up, rle, memory 8": partial(pack_png, up=True, level=1, strategy=rle, memory=8),
        "up, rle, memory 9": partial(pack_png, up=True, level=1, strategy=rle, memory=9),
        "none, rle, memory 5": partial(pack_png, up=False, level=1, strategy=rle, memory=5),
        "up, level 1": partial(pack_png, up=True, level=1, strategy=default, memory=8),
        "up, level 6": partial(pack_png, up=True, level=6, strategy=default, memory=8),
        "Pillow, level 1": partial(save_with_pillow, compress_level=1),
        "Pillow, level 6": partial(save_with_pillow, compress_level=6),
        "Pillow, level 9": partial(save_with_pillow, compress_level=9),
        "Pillow, optimize": partial(save_with_pillow, optimize=True),
        "OpenCV": save_with_opencv,
    }
    for name in ("default", "filtered", "huffman_only", "rle", "fixed"):
        # The strategy comes last, because OpenCV forgets it when it is told the level.
        strategy = (cv2.IMWRITE_PNG_STRATEGY, getattr(cv2, f"IMWRITE_PNG_STRATEGY_{name.upper()}"))
        encoders[f"OpenCV, {name}"] = partial(_opencv_with, (cv2.IMWRITE_PNG_COMPRESSION, 1, *strategy))
    up = (cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_UP)
    encoders["OpenCV, rle, up"] = partial(_opencv_with, (cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_RLE, *up))
    return {name: Way(encode, decode_mask) for name, encode in encoders.items()}


def _opencv_with(parameters: tuple[int, ...], mask: Mask) -> bytes:
    return save_with_opencv(mask, *parameters)


def list_ffv1_ways(size: Size) -> dict[str, Way]:
    """Ours, and what each option changes."""
    codecs = {
        "ours": Ffv1(size),
        "range_def": Ffv1(size, coder="range_def"),
        "range_tab": Ffv1(size, coder="range_tab"),
        "context 1": Ffv1(size, context="1"),
        "range_def, context 1": Ffv1(size, coder="range_def", context="1"),
        "9 slices": Ffv1(size, slices="9"),
        "16 slices": Ffv1(size, slices="16"),
        "24 slices": Ffv1(size, slices="24"),
        "no slicecrc": Ffv1(size, slicecrc="0"),
        "2 threads": Ffv1(size, threads=2),
        "16 slices, 2 threads": Ffv1(size, slices="16", threads=2),
        "range_def, 2 threads": Ffv1(size, coder="range_def", threads=2),
    }
    return {name: Way(codec.encode, codec.decode) for name, codec in codecs.items()}


def measure(kind: str, size: Size, *, frames: int, repeats: int) -> list[Row]:
    """A row for each way, and one for the video as a file, of one kind of input in one size."""
    masks = INPUTS[kind](size, frames)
    about = {"input": kind, "size": f"{size[0]}x{size[1]}"}
    rows = []
    for codec, ways in (("png", list_png_ways()), ("ffv1", list_ffv1_ways(size))):
        rows += [{**about, "codec": codec, **row} for row in take_turns(ways, masks, repeats)]
    return [*rows, {**about, "codec": "ffv1", **write_file(masks, repeats)}]


def take_turns(ways: dict[str, Way], masks: list[Mask], repeats: int) -> list[Row]:
    """A row for each way; ratios are to the first of them."""
    encode_seconds: dict[str, list[float]] = {name: [] for name in ways}
    decode_seconds: dict[str, list[float]] = {name: [] for name in ways}
    sizes: dict[str, list[int]] = {name: [] for name in ways}
    for repeat in range(repeats + 1):
        for mask in masks:
            for name, way in ways.items():
                started = time.perf_counter()
                data = way.encode(mask)
                encoded = time.perf_counter()
                decoded = way.decode(data)
                ended = time.perf_counter()
                assert np.array_equal(decoded, mask), name
                if repeat:  # the first round warms up
                    encode_seconds[name].append(encoded - started)
                    decode_seconds[name].append(ended - encoded)
                    sizes[name].append(len(data))
    ours = next(iter(ways))
    return [
        {
            "way": name,
            "bytes": statistics.mean(sizes[name]),
            "encode_seconds": statistics.median(encode_seconds[name]),
            "decode_seconds": statistics.median(decode_seconds[name]),
            "bytes_ratio": sum(sizes[name]) / sum(sizes[ours]),
            "encode_ratio": _ratio(encode_seconds[name], encode_seconds[ours]),
            "decode_ratio": _ratio(decode_seconds[name], decode_seconds[ours]),
        }
        for name in ways
    ]


def _ratio(times: list[float], ours: list[float]) -> float:
    return statistics.median(theirs / own for theirs, own in zip(times, ours, strict=True))


def write_file(masks: list[Mask], repeats: int) -> Row:
    """The whole of shared.inference.mask_video, per frame: checksums and the container too, and comparing."""
    height, width = masks[0].shape
    count = FILE_ROUNDS * len(masks)
    encode_seconds, decode_seconds = [], []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "masks.mkv"
        for _ in range(repeats):
            started = time.perf_counter()
            with MaskVideoWriter(path, (width, height), Fraction(1, 25)) as video:
                for number in range(count):
                    video.write(masks[number % len(masks)], number)
            written = time.perf_counter()
            equal = [np.array_equal(mask, masks[number % len(masks)]) for number, mask in read_masks(path)]
            decode_seconds.append((time.perf_counter() - written) / count)
            encode_seconds.append((written - started) / count)
            assert equal == [True] * count
        size = path.stat().st_size
    return {
        "way": "file",
        "bytes": size / count,
        "encode_seconds": statistics.median(encode_seconds),
        "decode_seconds": statistics.median(decode_seconds),
    }


def _print_table(rows: list[Row]) -> None:
    print(f"{'input':<7}{'size':<11}{'codec':<6}{'way':<22}{'bytes':>9}{'encode':>10}{'decode':>10}", end="")
    print(f"{'bytes ÷ ours':>14}{'encode':>8}{'decode':>8}")
    for row in rows:
        print(f"{row['input']:<7}{row['size']:<11}{row['codec']:<6}{row['way']:<22}{row['bytes']:>9.0f}", end="")
        print(f"{1000 * float(row['encode_seconds']):>7.2f} ms{1000 * float(row['decode_seconds']):>7.2f} ms", end="")
        ratios = [f"{row[key]:.2f}" if key in row else "" for key in ("bytes_ratio", "encode_ratio", "decode_ratio")]
        print(f"{ratios[0]:>14}{ratios[1]:>8}{ratios[2]:>8}")


def _size(text: str) -> Size:
    width, _, height = text.partition("x")
    return int(width), int(height or width)


def run(arguments: Sequence[str] = ()) -> None:
    """Measure and print; the last line is one JSON object with --json."""
    parser = argparse.ArgumentParser(prog="python -m bench codecs", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("sizes", nargs="*", type=_size, metavar="SIZE")
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--frames", type=int, default=3)
    parser.add_argument("--input", choices=[*INPUTS], action="append", help="both unless given")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    rows = []
    for kind in options.input or INPUTS:
        for size in options.sizes or SIZES:
            rows += measure(kind, size, frames=options.frames, repeats=options.repeats)
            print(kind, size, file=sys.stderr)
    device, _ = describe_device(torch.device("cpu"))
    about = {"device": device, "PyAV": av.__version__, "OpenCV": cv2.__version__, "zlib": zlib.ZLIB_RUNTIME_VERSION}
    print(", ".join(f"{key} {value}" for key, value in about.items()), platform.platform(), sep=", ")
    _print_table(rows)
    if options.json:
        print(json.dumps({**about, "codecs": rows}))


if __name__ == "__main__":
    run(sys.argv[1:])
