"""The main job, end to end, by real processes."""

import io
import struct
import zlib

import httpx2
import numpy as np
import pytest
from PIL import Image

from cli.local.stack import SOURCES
from shared.inference.demo.scenes import draw_scene
from tests.acceptance.conftest import Service, encode
from tests.receiver import Receiver


def test_a_submitted_image_becomes_a_mask_and_a_verified_webhook(
    service: Service, receiver: Receiver, scene: bytes
) -> None:
    job = service.submit(
        scene, webhook_url=receiver.url, metadata={"shelf": 7}, options={"outputs": ["mask", "overlay"]}
    )
    done = service.wait_for(job)
    assert done["state"] == "succeeded", done
    assert {file["name"] for file in service.result(done)["files"]} == {"mask.png", "overlay.png"}
    [delivery] = receiver.wait_for(job["id"])
    event = delivery.verify(service.stack.webhook_secret)
    assert event["type"] == "job.succeeded"
    assert event["data"] == done | {"queue_position": None}


def test_the_mask_agrees_with_the_scene_it_was_made_from(service: Service, scene: bytes) -> None:
    truth = draw_scene(7, width=320, height=240).labels
    mask = service.mask(service.wait_for(service.submit(scene)))
    assert mask.shape == truth.shape
    assert (mask == truth).mean() > 0.9


@pytest.mark.parametrize("by", ["s3", "url"])
def test_a_source_that_lies_elsewhere_gives_the_mask_of_the_same_file_sent(
    service: Service, scene: bytes, by: str
) -> None:
    elsewhere = service.storage().other(SOURCES)
    elsewhere.put("scenes/a.png", scene, content_type="image/png")
    places = {"s3": f"s3://{SOURCES}/scenes/a.png", "url": elsewhere.link("scenes/a.png")}
    asked = {"source": {by: places[by]}, "mode": "demo"}
    job = service.http.post("/v1/jobs", json=asked).raise_for_status().json()
    done = service.wait_for(job)
    assert (done["state"], done["kind"], done["source"]["size_bytes"]) == ("succeeded", "image", len(scene)), done
    sent = service.wait_for(service.submit(scene))
    assert np.array_equal(service.mask(done), service.mask(sent))


def test_a_failed_job_tells_its_webhook_too(service: Service, receiver: Receiver) -> None:
    job = service.submit(b"no image at all", name="holiday.jpg", webhook_url=receiver.url)
    assert service.wait_for(job)["error"]["code"] == "invalid_media"
    [delivery] = receiver.wait_for(job["id"])
    assert delivery.verify(service.stack.webhook_secret)["type"] == "job.failed"


def _rotated_photo() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encode(draw_scene(3, width=160, height=96).image, kind="JPEG", exif=exif)


def _cmyk_photo() -> bytes:
    return encode(Image.fromarray(draw_scene(3, width=160, height=96).image).convert("CMYK"), kind="JPEG")


def _deep_gray() -> bytes:
    gray = np.asarray(Image.fromarray(draw_scene(3, width=160, height=96).image).convert("L")).astype(np.uint16) * 257
    return encode(Image.fromarray(gray))


def _palette() -> bytes:
    return encode(Image.fromarray(draw_scene(3, width=160, height=96).image).convert("P"))


@pytest.mark.parametrize(
    ("image", "shape"),
    [
        pytest.param(_rotated_photo(), (160, 96), id="EXIF orientation 6"),
        pytest.param(_cmyk_photo(), (96, 160), id="CMYK JPEG"),
        pytest.param(_deep_gray(), (96, 160), id="16-bit gray PNG"),
        pytest.param(_palette(), (96, 160), id="palette PNG"),
    ],
)
def test_every_kind_of_picture_gives_a_mask_of_its_upright_size(
    service: Service, image: bytes, shape: tuple[int, int]
) -> None:
    done = service.wait_for(service.submit(image))
    assert done["state"] == "succeeded", done
    assert service.mask(done).shape == shape


def _huge_header() -> bytes:
    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 0, 0, 0, 0)
    chunk = struct.pack(">I", len(header)) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 0) + b"IEND" + struct.pack(">I", zlib.crc32(b"IEND"))


def _cut_jpeg() -> bytes:
    whole = encode(draw_scene(3, width=320, height=240).image, kind="JPEG")
    return whole[: len(whole) // 2]


@pytest.mark.parametrize(
    ("source", "name", "code"),
    [
        pytest.param(b"just some text\n" * 100, "holiday.jpg", "invalid_media", id="text named .jpg"),
        pytest.param(_cut_jpeg(), "cut.jpg", "invalid_media", id="truncated JPEG"),
        pytest.param(_huge_header(), "huge.png", "media_limit", id="100k by 100k PNG header"),
    ],
)
def test_what_is_no_image_fails_with_a_stable_code_and_the_next_job_runs(
    service: Service, scene: bytes, source: bytes, name: str, code: str
) -> None:
    failed = service.wait_for(service.submit(source, name=name))
    assert (failed["state"], failed["error"]["code"]) == ("failed", code)
    assert failed["attempts"] == 1
    assert service.wait_for(service.submit(scene))["state"] == "succeeded"


def test_weights_that_cannot_be_had_fail_the_job_and_the_worker_lives_on(service: Service, scene: bytes) -> None:
    failed = service.wait_for(service.submit(scene, mode="sota"))
    assert failed["error"]["code"] == "model_unavailable"
    assert "maskline models pull sota" in failed["error"]["detail"]
    assert service.wait_for(service.submit(scene))["state"] == "succeeded"


def test_a_mask_opens_as_the_ids_it_means(service: Service, scene: bytes) -> None:
    done = service.wait_for(service.submit(scene))
    modes = {mode["name"]: mode for mode in service.http.get("/v1/modes").json()}
    known = {each["id"] for each in modes["demo"]["classes"]}
    assert set(np.unique(service.mask(done))) <= known
    listed = {each["id"]: each["pixels"] for each in service.result(done)["classes"]}
    assert sum(listed.values()) == 320 * 240


def test_the_file_route_leads_to_the_mask_itself(service: Service, scene: bytes) -> None:
    done = service.wait_for(service.submit(scene))
    answer = service.http.get(f"/v1/jobs/{done['id']}/files/mask.png")
    assert answer.status_code == 307
    with Image.open(io.BytesIO(httpx2.get(answer.headers["location"]).raise_for_status().content)) as image:
        assert image.size == (320, 240)
