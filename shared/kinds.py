"""Whether a file is an image or a recording, told by its first bytes. What it really holds, a worker finds out."""

import mimetypes

from shared.contract import JobKind
from shared.inference.signatures import find_container, is_still

_IMAGES = (b"\xff\xd8\xff", b"\x89PNG", b"II*\x00", b"MM\x00*", b"BM", b"GIF8", b"II+\x00", b"MM\x00+")
_UNREAD = (b"OggS", b"\x30\x26\xb2\x75")
"""Containers of recordings that no worker reads, and whoever sends one is to be told so: Ogg, ASF."""


def tell_kind(head: bytes, *, filename: str, content_type: str) -> JobKind:
    """By `head`, the first HEAD_BYTES; name and type count only where these are of no format that is known here."""
    if find_container(head) is not None or head.startswith(_UNREAD):
        return "recording"
    if head.startswith(_IMAGES) or (head[:4] == b"RIFF" and head[8:12] == b"WEBP") or is_still(head):
        return "image"
    guessed = mimetypes.guess_type(filename)[0] or ""
    return "recording" if content_type.startswith("video/") or guessed.startswith("video/") else "image"
