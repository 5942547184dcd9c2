"""Submissions that are refused: by a problem with a stable code, and with nothing left behind."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from starlette.testclient import TestClient

from api.main import MULTIPART_OVERHEAD_BYTES
from shared.config import Api, Settings, Webhooks
from shared.db import SessionFactory
from shared.models import Job, Upload, WebhookEndpoint, create_id
from shared.storage import Storage
from tests.integration.conftest import Submit, count_rows, problem, serve, small_image

DEEP = "[" * 10_000 + "]" * 10_000


@pytest.fixture(autouse=True)
def _nothing_is_left_behind(sessions: SessionFactory, storage: Storage) -> Iterator[None]:
    yield
    assert (count_rows(sessions, Job), count_rows(sessions, Upload), storage.list_keys("")) == (0, 0, [])


def document(**changed: Any) -> dict[str, Any]:
    """The other form of a submission, whose upload does not exist: it is refused before that is noticed."""
    return {"mode": "demo", "source": {"upload_id": str(create_id())}, **changed}


def test_fields_that_do_not_exist_are_refused(api: TestClient, submit: Submit, subtests: pytest.Subtests) -> None:
    unknown: list[dict[str, Any]] = [{"mod": "demo"}, {"id": "1"}, {"options": {"size": 1}}, {"tenant_id": "1"}]
    for fields in unknown:
        with subtests.test(fields=fields):
            problem(submit(**fields), 422, "invalid_request")
            problem(api.post("/v1/jobs", json=document(**fields)), 422, "invalid_request")
    two_sources = {"upload_id": str(create_id()), "url": "https://images.example/a.png"}
    problem(api.post("/v1/jobs", json=document(source=two_sources)), 422, "invalid_request")


def test_a_refusal_names_the_field(submit: Submit) -> None:
    refused = problem(submit(options={"input_size": 7}), 422, "invalid_request")
    assert [each["field"] for each in refused["errors"]] == ["body.options.input_size"]


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("mode", ["best", "DEMO", "", 1, None, ["demo"]]),
        ("priority", [True, 101, -101, 1.5, "1", None, 2**63]),
        ("options", [None, [], "{}", 1]),
        ("options.input_size", [True, 0, -1, 31, 4097, 2**63, 64.5, "64", [64]]),
        ("options.outputs", [[], ["mask", "video"], "mask", None, [["mask"]]]),
        ("metadata", [None, [], "text", 1]),
    ],
)
def test_values_out_of_range_or_of_another_type_are_refused(
    api: TestClient, submit: Submit, subtests: pytest.Subtests, field: str, values: list[object]
) -> None:
    for value in values:
        outer, _, inner = field.partition(".")
        fields = {outer: {inner: value} if inner else value}
        with subtests.test(value=value):
            problem(api.post("/v1/jobs", json=document(**fields)), 422, "invalid_request")
            if not isinstance(value, str):  # in a form every field is text
                problem(submit(**fields), 422, "invalid_request")


@pytest.mark.parametrize(
    "metadata",
    [
        r'{"a": "\u0000"}',
        r'{"\u0000": 1}',
        r'{"a": ["\ud800"]}',
        r'{"\udfff": 1}',
        '{"a": 1e400}',
        '{"a": -1e400}',
        '{"a": NaN}',
        '{"a": Infinity}',
        '{"a": ' + "9" * 5000 + "}",
        '{"a": ' * 17 + "1" + "}" * 17,
        '{"a": ' + DEEP + "}",
        DEEP,
        json.dumps({"a": "x" * 16_001}),
        json.dumps({"a": "x" * 70_000}),
        '{"a": ',
        "",
    ],
    ids=range(16),
)
def test_metadata_that_cannot_be_kept_is_refused_in_either_form(api: TestClient, submit: Submit, metadata: str) -> None:
    problem(submit(metadata=metadata), 422, "invalid_request")
    content = json.dumps(document(metadata="here")).replace('"here"', metadata)
    headers = {"content-type": "application/json"}
    problem(api.post("/v1/jobs", content=content, headers=headers), 422, "invalid_request")


def test_a_webhook_url_that_cannot_be_called_is_refused(submit: Submit, subtests: pytest.Subtests) -> None:
    for url in (
        "",
        "receiver.example",
        "/hook",
        "//receiver.example",
        "file:///etc/passwd",
        "gopher://receiver.example",
        "ftp://receiver.example",
        "data:text/plain,x",
        "javascript:alert(1)",
        "http://",
        "http:///hook",
        "http://:80/",
        "http://user:pass@receiver.example",
        "http://user@receiver.example",
        "http://good\\@127.0.0.1/",
        "http://receiver.example:0/",
        "http://receiver.example:99999/",
        "http://receiver.example:http/",
        "http://[::1",
        "https://receiver.example/" + "x" * 8000,
    ):
        with subtests.test(url=url[:60]):
            problem(submit(webhook_url=url), 422, "invalid_request")


# --- forms and bodies that are none --------------------------------------------------------------------------------


def test_a_form_without_its_one_file_is_refused(api: TestClient, subtests: pytest.Subtests) -> None:
    image = ("a.png", small_image())
    forms: dict[str, Any] = {
        "no file": [("other", image)],
        "two files": [("file", image), ("file", image)],
        "a second file": [("file", image), ("other", image)],
        "an empty file": [("file", ("a.png", b""))],
        "a file for a field": [("mode", image)],
        "a file without a name": [("file", (None, b"text"))],
    }
    for case, files in forms.items():
        with subtests.test(case):
            problem(api.post("/v1/jobs", data={"mode": "demo"}, files=files), 422, "invalid_request")


def test_a_field_given_twice_is_refused(api: TestClient) -> None:
    sent = {"file": ("a.png", small_image())}
    problem(api.post("/v1/jobs", data={"mode": ["demo", "fast"]}, files=sent), 422, "invalid_request")


def test_a_form_without_a_mode_is_refused(api: TestClient) -> None:
    problem(api.post("/v1/jobs", files={"file": ("a.png", small_image())}), 422, "invalid_request")


@pytest.mark.parametrize(
    "content_type",
    [
        None,
        "",
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data",
        "multipart/mixed",
        "image/png",
    ],
)
def test_another_content_type_is_refused(api: TestClient, content_type: str | None) -> None:
    headers = {} if content_type is None else {"content-type": content_type}
    problem(api.post("/v1/jobs", content=b'{"mode": "demo"}', headers=headers), 422, "invalid_request")


def test_a_form_that_is_broken_is_refused(api: TestClient, subtests: pytest.Subtests) -> None:
    field = b'--x\r\nContent-Disposition: form-data; name="mode"\r\n\r\ndemo\r\n'
    for body in (b"", b"garbage", b"--x\r\n\r\n--x--", b"--x\r\n" * 10_000, field * 10_000 + b"--x--"):
        with subtests.test(body=body[:80]):
            headers = {"content-type": "multipart/form-data; boundary=x"}
            problem(api.post("/v1/jobs", content=body, headers=headers), 422, "invalid_request")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Starlette leaves such a file to the gc
def test_a_form_that_breaks_off_is_refused(api: TestClient) -> None:
    part = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\nthe first half'
    headers = {"content-type": "multipart/form-data; boundary=x"}
    problem(api.post("/v1/jobs", content=part, headers=headers), 422, "invalid_request")


@pytest.mark.parametrize("path", ["/v1/jobs", "/v1/uploads"])
def test_a_body_that_is_not_the_json_asked_for_is_refused(
    api: TestClient, subtests: pytest.Subtests, path: str
) -> None:
    valid = json.dumps(document())
    for body in (
        b"",
        b"null",
        b"[]",
        b"1",
        b'"text"',
        b"{",
        b"{}garbage",
        b"\xff\xfe",
        DEEP.encode(),
        valid.encode("utf-16"),
        b"\xef\xbb\xbf{",
    ):
        with subtests.test(body=body[:40]):
            headers = {"content-type": "application/json"}
            problem(api.post(path, content=body, headers=headers), 422, "invalid_request")


# --- what is too large ---------------------------------------------------------------------------------------------


@pytest.fixture
def narrow_api(settings: Settings, storage: Storage, api_key: str) -> Iterator[TestClient]:
    """A service that takes 10 kB of JSON and files of 100 kB."""
    limits = Api(json_body_bytes=10_000, upload_body_bytes=100_000)
    with serve(settings.model_copy(update={"api": limits}), key=api_key) as client:
        yield client


@pytest.mark.parametrize("path", ["/v1/jobs", "/v1/uploads"])
@pytest.mark.parametrize("announced", [True, False])
def test_json_over_its_limit_is_refused(narrow_api: TestClient, path: str, *, announced: bool) -> None:
    body = json.dumps(document(metadata={"a": "x" * 10_000})).encode()
    headers = {"content-type": "application/json"}
    content = body if announced else iter([body[:5000], body[5000:]])
    problem(narrow_api.post(path, content=content, headers=headers), 413, "too_large")


def test_a_file_over_its_limit_is_refused(narrow_api: TestClient) -> None:
    sent = {"file": ("a.png", b"x" * 100_001)}
    problem(narrow_api.post("/v1/jobs", data={"mode": "demo"}, files=sent), 413, "too_large")


@pytest.mark.parametrize("announced", [True, False])
def test_a_form_over_its_limit_is_refused(narrow_api: TestClient, *, announced: bool) -> None:
    head = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
    body = head + bytes(100_000 + MULTIPART_OVERHEAD_BYTES) + b"\r\n--x--"
    headers = {"content-type": "multipart/form-data; boundary=x"}
    content = body if announced else iter([body[:5000], body[5000:]])
    problem(narrow_api.post("/v1/jobs", content=content, headers=headers), 413, "too_large")


@pytest.mark.parametrize(
    "url", ["http://receiver.example/hook", "https://receiver.example:8443", "https://10.1.2.3", "https://[::1]/"]
)
def test_a_receiver_that_would_not_be_called_is_refused_where_it_is_named(
    settings: Settings, api_key: str, url: str, sessions: SessionFactory
) -> None:
    source = document()["source"]
    with serve(settings.model_copy(update={"webhooks": Webhooks()}), key=api_key) as api:
        form = {"mode": "demo", "webhook_url": url}
        problem(api.post("/v1/jobs", data=form, files={"file": ("a.png", small_image())}), 422, "address_refused")
        problem(api.post("/v1/jobs", json=document(webhook_url=url)), 422, "address_refused")
        batch = {"name": "b", "mode": "demo", "items": [{"source": source}], "webhook_url": url}
        problem(api.post("/v1/batches", json=batch), 422, "address_refused")
        problem(api.post("/v1/webhooks", json={"url": url, "description": "ours"}), 422, "address_refused")
        assert count_rows(sessions, WebhookEndpoint) == 0
        made = api.post("/v1/webhooks", json={"url": "https://receiver.example"}).raise_for_status().json()
        problem(api.patch(f"/v1/webhooks/{made['id']}", json={"url": url}), 422, "address_refused")
