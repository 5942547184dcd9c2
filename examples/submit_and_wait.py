"""Submit an image, wait for its mask, save it. A client of the REST interface with nothing but httpx2.

python examples/submit_and_wait.py http://127.0.0.1:8000 mk_… photo.jpg mask.png
"""
# ruff: noqa: T201  # an example talks to its reader

import sys
import uuid
from pathlib import Path

import httpx2

WAIT_SECONDS = 60
DONE = ("succeeded", "failed", "canceled", "expired")


def segment(url: str, api_key: str, image: Path, *, mode: str = "demo") -> bytes:
    """The mask as a PNG: one class id per pixel, of the image's own size."""
    headers = {"Authorization": f"Bearer {api_key}"}
    with httpx2.Client(base_url=url, headers=headers, timeout=WAIT_SECONDS + 10) as service:
        # With a key, sending the request again after a broken line never makes a second job.
        once = {"Idempotency-Key": uuid.uuid4().hex, "Prefer": f"wait={WAIT_SECONDS}"}
        with image.open("rb") as file:
            answer = service.post("/v1/jobs", data={"mode": mode}, files={"file": (image.name, file)}, headers=once)
        job = answer.raise_for_status().json()
        while job["state"] not in DONE:  # longer than we may wait at once: follow its events until the last one
            with service.sse(job["links"]["events"]) as events:
                for event in events:
                    if event.event == "completed":
                        job = event.json()
        if job["state"] != "succeeded":
            raise SystemExit(f"the job {job['state']}: {job['error']}")
        [mask] = [file for file in service.get(job["links"]["result"]).json()["files"] if file["name"] == "mask.png"]
    return httpx2.get(mask["url"]).raise_for_status().content


if __name__ == "__main__":
    Path(sys.argv[4]).write_bytes(segment(sys.argv[1], sys.argv[2], Path(sys.argv[3])))
    print(f"saved {sys.argv[4]}")
