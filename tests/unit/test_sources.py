"""Who may have which bucket read, and what is shown of a place."""

import pytest

from shared.contract import Options
from shared.errors import KindMismatch, SourceForbidden
from shared.sources import Place, check_kind, check_may_read, clean_name, describe_remote


@pytest.mark.parametrize(
    ("readable", "url"),
    [
        ("archive", "s3://archive/a/b.mp4"),
        ("archive/", "s3://archive/b.mp4"),
        ("archive/2026/", "s3://archive/2026/b.mp4"),
        ("archive/{tenant}/", "s3://archive/zoo/b.mp4"),
        ("archive/of/{tenant}/raw/", "s3://archive/of/zoo/raw/"),
    ],
)
def test_a_place_that_is_readable_is_read(readable: str, url: str) -> None:
    check_may_read(Place.parse(url), "zoo", readable=["other", readable])


@pytest.mark.parametrize(
    ("readable", "url"),
    [
        ("archive", "s3://archive2/b.mp4"),
        ("archive/2026/", "s3://archive/2025/b.mp4"),
        ("archive/2026/", "s3://archive/2026"),
        ("archive/2026/", "s3://archive/"),
        ("archive/{tenant}/", "s3://archive/zoology/b.mp4"),
        ("archive/{tenant}/", "s3://archive/{tenant}/b.mp4"),
        ("archive/{tenant}/", "s3://archive/other/b.mp4"),
    ],
)
def test_a_place_that_is_not_readable_is_refused(readable: str, url: str) -> None:
    with pytest.raises(SourceForbidden):
        check_may_read(Place.parse(url), "zoo", readable=[readable])


def test_nothing_is_readable_unless_it_was_said() -> None:
    with pytest.raises(SourceForbidden):
        check_may_read(Place.parse("s3://archive/b.mp4"), "zoo", readable=[])


def test_a_tenant_whose_name_is_a_path_does_not_get_into_anothers_folder() -> None:
    with pytest.raises(SourceForbidden):
        check_may_read(Place.parse("s3://archive/zoo/lions/b.mp4"), "zoo/lions", readable=["archive/{tenant}/"])


@pytest.mark.parametrize("url", ["archive/b", "s3://", "s3://archive", "s3:///b", "s3://UP/b", "https://a.example/b"])
def test_what_is_no_place_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="s3://bucket/key"):
        Place.parse(url)


def test_a_key_is_taken_as_it_is() -> None:
    assert Place.parse("s3://archive/a b/?x=1#y/%20.mp4").key == "a b/?x=1#y/%20.mp4"


def test_what_may_be_a_secret_of_a_url_is_not_shown() -> None:
    source = describe_remote("https://a.example/films/Z%C3%BCrich%20.mp4?X-Amz-Signature=secret#t=1", expect=None)
    assert (source["location"], source["filename"]) == ("https://a.example/films/Z%C3%BCrich%20.mp4", "Zürich .mp4")
    assert source["url"].endswith("?X-Amz-Signature=secret#t=1")


@pytest.mark.parametrize(
    ("path", "name"),
    [("a/b/c.mp4", "c.mp4"), ("C:\\films\\c.mp4", "c.mp4"), ("a/", "a"), ("", "file"), ("a/\x07b.mp4", "b.mp4")],
)
def test_a_file_is_called_by_the_last_part_of_its_path(path: str, name: str) -> None:
    assert clean_name(path) == name


def test_what_was_not_expected_is_refused_by_its_name() -> None:
    with pytest.raises(KindMismatch, match=r"a\.png is not a recording"):
        check_kind("image", Options(), filename="a.png", expect="recording")
    check_kind("recording", Options(), filename="a.png", expect="recording")
