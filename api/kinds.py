"""Whether a file is an image or a recording, told by its first bytes. What it really holds, a worker finds out."""

import mimetypes

from shared.contract import JobKind

HEAD_BYTES = 512

_IMAGES = (b"\xff\xd8\xff", b"\x89PNG", b"II*\x00", b"MM\x00*", b"BM", b"GIF8", b"II+\x00", b"MM\x00+")
_RECORDINGS = (
    b"\x1a\x45\xdf\xa3",  # Matroska, WebM
    b"OggS",
    b"FLV",
    b"\x00\x00\x01\xba",  # MPEG program stream
    b"\x30\x26\xb2\x75",  # ASF
)
_BOXES = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot")
_STILL_BRANDS = (b"avif", b"avis", b"heic", b"heix", b"mif1", b"msf1")
_TRANSPORT_PACKETS = ((0, 188), (4, 192))
"""Where the first packet of an MPEG transport stream begins, and how many bytes each has."""


def tell_kind(head: bytes, *, filename: str, content_type: str) -> JobKind:
    """By `head`, the first HEAD_BYTES; name and type count only where these are of no format that is known here."""
    if _is_recording(head):
        return "recording"
    if head.startswith(_IMAGES) or (head[:4] == b"RIFF" and head[8:12] == b"WEBP") or head[4:8] == b"ftyp":
        return "image"
    guessed = mimetypes.guess_type(filename)[0] or ""
    return "recording" if content_type.startswith("video/") or guessed.startswith("video/") else "image"


def _is_recording(head: bytes) -> bool:
    if head.startswith(_RECORDINGS):
        return True
    if head[:4] == b"RIFF":
        return head[8:12] == b"AVI "
    if head[4:8] in _BOXES:
        return not (head[4:8] == b"ftyp" and head[8:12] in _STILL_BRANDS)
    return any(
        head[start : start + 1] == b"G" and head[start + size : start + size + 1] == b"G"
        for start, size in _TRANSPORT_PACKETS
    )
