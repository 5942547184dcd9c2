"""Containers of recordings, recognised by their first bytes. A file's name says nothing."""

HEAD_BYTES = 4 * 204
"""So many of a file's first bytes are enough."""

_BOXES = frozenset({b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"styp", b"pnot"})
_STILL_BRANDS = frozenset({b"avif", b"avis", b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"})
_STARTS = {
    b"\x1a\x45\xdf\xa3": "matroska",
    b"\x00\x00\x01\xba": "mpeg",
    b"FLV\x01": "flv",
}
_TRANSPORT_PACKETS = ((188, 0), (192, 4), (204, 0))
"""Length of a packet of a transport stream and where its sync byte stands: plain, with time codes, with parity."""
_SYNC = 0x47


def find_container(head: bytes) -> str | None:
    """FFmpeg's name of the demuxer for a file that begins with `head`; None where it is none of those that are read."""
    if head[4:8] in _BOXES:
        return None if is_still(head) else "mov"
    if head.startswith(b"RIFF"):
        return "avi" if head[8:12] == b"AVI " else None
    for start, name in _STARTS.items():
        if head.startswith(start):
            return name
    for length, offset in _TRANSPORT_PACKETS:
        if len(head) > 2 * length + offset and {head[offset + k * length] for k in range(3)} == {_SYNC}:
            return "mpegts"
    return None


def is_still(head: bytes) -> bool:
    """Whether the container is that of recordings, and holds a picture."""
    return head[4:8] == b"ftyp" and head[8:12] in _STILL_BRANDS
