"""An image or a recording: the first bytes decide, and a name only where they say nothing."""

import pytest

from shared.kinds import tell_kind

PACKET = b"G" + bytes(187)


@pytest.mark.parametrize(
    ("head", "kind"),
    [
        (b"\xff\xd8\xff\xe0", "image"),
        (b"\x89PNG\r\n\x1a\n", "image"),
        (b"RIFF\x00\x00\x00\x00WEBPVP8 ", "image"),
        (b"II*\x00", "image"),
        (b"BM\x00\x00", "image"),
        (b"\x00\x00\x00\x18ftypavif", "image"),
        (b"\x00\x00\x00\x18ftypisom", "recording"),
        (b"\x00\x00\x00\x14ftypqt  ", "recording"),
        (b"\x00\x00\x00\x08wide\x00\x00\x00\x00mdat", "recording"),
        (b"\x1a\x45\xdf\xa3", "recording"),
        (b"RIFF\x00\x00\x00\x00AVI LIST", "recording"),
        (PACKET * 3, "recording"),
        (bytes(4) + (PACKET + bytes(4)) * 3, "recording"),
        (b"\x00\x00\x01\xba", "recording"),
    ],
)
def test_the_first_bytes_decide_whatever_the_name(head: bytes, kind: str) -> None:
    for filename, content_type in (("a.png", "image/png"), ("a.mp4", "video/mp4"), ("a", "")):
        assert tell_kind(head, filename=filename, content_type=content_type) == kind


@pytest.mark.parametrize(
    ("filename", "content_type", "kind"),
    [
        ("clip.mp4", "application/octet-stream", "recording"),
        ("clip", "video/x-matroska", "recording"),
        ("photo.jpg", "application/octet-stream", "image"),
        ("notes", "text/plain", "image"),
    ],
)
def test_where_they_say_nothing_name_and_type_do(filename: str, content_type: str, kind: str) -> None:
    assert tell_kind(b"#EXTM3U\n", filename=filename, content_type=content_type) == kind
    assert tell_kind(b"", filename=filename, content_type=content_type) == kind
