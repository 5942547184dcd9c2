"""Results over REST: there all at once, by links that work and end."""

import hashlib
import json
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx2
import pytest
from starlette.testclient import TestClient

from shared.config import Settings
from shared.inference.masks import decode_mask
from shared.models import JobState
from tests.integration.conftest import MakeJob, Submit, changed, problem, serve
from tests.integration.workbench import CLASS_ID, Workbench


@pytest.fixture
def links(submit: Submit, workbench: Workbench) -> dict[str, str]:
    """Of a job that has succeeded, with a mask and an overlay."""
    submitted: dict[str, str] = submit(options={"outputs": ["mask", "overlay"]}).json()["links"]
    workbench.run()
    return submitted


def test_there_is_no_result_before_the_job_has_succeeded(api: TestClient, job_in: MakeJob) -> None:
    for state in reversed([state for state in JobState if state != JobState.SUCCEEDED]):
        job = job_in(state)
        refused = problem(api.get(f"/v1/jobs/{job.id}/result"), 409, "not_ready")
        assert state in refused["detail"]
        problem(api.get(f"/v1/jobs/{job.id}/files/mask.png"), 409, "not_ready")


def test_every_file_of_the_manifest_can_be_downloaded_and_is_what_it_says(
    api: TestClient, links: dict[str, str]
) -> None:
    files = api.get(links["result"]).json()["files"]
    assert [file["name"] for file in files] == ["mask.png", "overlay.png"]
    for file in files:
        body = httpx2.get(file["url"]).raise_for_status().content
        assert (len(body), hashlib.sha256(body).hexdigest()) == (file["size"], file["sha256"])


def test_the_mask_is_of_the_size_of_the_image(api: TestClient, links: dict[str, str]) -> None:
    manifest = api.get(links["result"]).json()
    mask = decode_mask(httpx2.get(manifest["files"][0]["url"]).content)
    assert mask.shape == (manifest["source"]["height"], manifest["source"]["width"]) == (32, 48)
    assert set(mask.ravel()) == {CLASS_ID}


def test_confidence_is_a_file_of_its_own_where_it_is_asked_for(
    api: TestClient, submit: Submit, workbench: Workbench
) -> None:
    links = submit(options={"outputs": ["mask", "confidence"], "unlabeled_below": 0.5}).json()["links"]
    workbench.run()
    manifest = api.get(links["result"]).json()
    assert [file["name"] for file in manifest["files"]] == ["mask.png", "confidence.png"]
    assert manifest["warnings"] == []
    assert decode_mask(httpx2.get(manifest["files"][1]["url"]).content).shape == (32, 48)


def test_the_manifest_says_what_was_found_and_how(api: TestClient, links: dict[str, str]) -> None:
    manifest = api.get(links["result"]).json()
    [found] = manifest["classes"]
    assert (found["id"], found["pixels"], found["fraction"]) == (CLASS_ID, 32 * 48, 1.0)
    assert (manifest["mode"], manifest["label_space"], manifest["attempt"]) == ("demo", "demo", 1)
    assert manifest["links_expire_in_seconds"] > 0


def test_where_files_lie_in_the_storage_is_not_told(api: TestClient, links: dict[str, str]) -> None:
    manifest = api.get(links["result"]).json()
    without_links = {**manifest, "files": [{**file, "url": ""} for file in manifest["files"]]}
    assert "tenants/" not in json.dumps(without_links)


def test_a_link_is_good_for_its_own_object_alone(api: TestClient, links: dict[str, str]) -> None:
    mask, overlay = (file["url"] for file in api.get(links["result"]).json()["files"])
    assert httpx2.get(mask.replace("mask.png", "overlay.png", 1)).status_code == 403
    assert httpx2.delete(overlay).status_code == 403
    assert httpx2.put(overlay, content=b"").status_code == 403
    assert httpx2.get(overlay).status_code == 200


def test_a_link_says_for_how_long_it_is_good(settings: Settings, links: dict[str, str], api_key: str) -> None:
    with serve(changed(settings, "storage", link_seconds=70), key=api_key) as brief:
        [mask, _] = brief.get(links["result"]).json()["files"]
    assert parse_qs(urlsplit(mask["url"]).query)["X-Amz-Expires"] == ["70"]


def test_a_file_is_found_by_its_name(api: TestClient, links: dict[str, str]) -> None:
    answer = api.get(f"{links['self']}/files/mask.png")
    assert answer.status_code == 307
    download = httpx2.get(answer.headers["location"])
    assert download.headers["content-disposition"] == 'inline; filename="mask.png"'
    assert decode_mask(download.content).shape == (32, 48)


def test_a_file_that_the_manifest_does_not_list_is_not_found(
    api: TestClient, links: dict[str, str], subtests: pytest.Subtests
) -> None:
    for name in ("video.mkv", "manifest.json", "..%2Fmanifest.json", "MASK.PNG", "%00", "mask.png%0D%0A"):
        with subtests.test(name=name):
            problem(api.get(f"{links['self']}/files/{name}"), 404, "not_found")


def test_links_lead_to_where_clients_reach_the_storage(
    settings: Settings, api: TestClient, api_key: str, links: dict[str, str]
) -> None:
    public = changed(settings, "storage", public_endpoint_url="https://masks.example")
    with serve(public, key=api_key) as elsewhere:
        files: list[dict[str, Any]] = elsewhere.get(links["result"]).json()["files"]
        upload = elsewhere.post("/v1/uploads", json={"filename": "a.png", "size": 5}).json()
    assert all(each["url"].startswith("https://masks.example/") for each in [*files, upload])
