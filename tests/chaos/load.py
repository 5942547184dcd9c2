"""The load: customers who submit images and recordings, in forms and as uploads, and do not give up before a 202.

Each submission has an Idempotency-Key of its own, so that asking again after a broken line makes no second job.
"""

import io
import json
import random
import threading
import uuid
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import httpx2
from PIL import Image

from shared.inference.demo.scenes import draw_scene
from tests.chaos.system import System
from tests.recordings import encode

CUSTOMERS = 3
WAITING_AT_MOST = 12
"""Jobs that have not ended; more would only wait."""
PAUSE_SECONDS = 0.2


@dataclass(frozen=True)
class Input:
    name: str
    body: bytes = field(repr=False)
    options: dict[str, Any]


def make_inputs() -> list[Input]:
    """Images, and recordings of a chunk for every frame."""
    inputs = []
    for number in range(4):
        buffer = io.BytesIO()
        Image.fromarray(draw_scene(number, width=160, height=120).image).save(buffer, format="PNG")
        inputs.append(Input(f"scene-{number}.png", buffer.getvalue(), {"input_size": 128}))
    for frames in (3, 5):
        buffer = io.BytesIO()
        encode(buffer, "libx264", container="mp4", frames=frames, options={"g": "1"})
        inputs.append(Input(f"clip-{frames}.mp4", buffer.getvalue(), {"input_size": 128}))
    return inputs


class Load:
    """As a context manager, customers submit until the block ends; what they were promised is in `accepted`."""

    def __init__(self, system: System, inputs: list[Input], webhook_url: str, *, seed: int) -> None:
        self.accepted: dict[str, str] = {}
        """Input by job id, of every job that was answered for."""
        self._system, self._inputs, self._webhook_url, self._seed = system, inputs, webhook_url, seed
        self._ending = threading.Event()
        self._lock = threading.Lock()
        self._customers = [threading.Thread(target=self._keep_submitting, args=(n,)) for n in range(CUSTOMERS)]

    def __enter__(self) -> Self:
        for each in self._customers:
            each.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ending.set()
        for each in self._customers:
            each.join()

    def submit(self, wanted: Input, *, as_upload: bool = False) -> None:
        """Until it is accepted."""
        key = str(uuid.uuid4())
        upload_id: str | None = None
        while True:
            try:
                with self._system.client() as client:
                    if as_upload and upload_id is None:
                        upload_id = self._upload(client, wanted)
                    answer = self._post(client, wanted, key, upload_id)
            except httpx2.HTTPError:
                answer = None
            if answer is not None and answer.status_code == 202:
                with self._lock:
                    self.accepted[answer.json()["id"]] = wanted.name
                return
            refused = answer is not None and answer.status_code < 500 and answer.status_code != 409
            assert answer is None or not refused, answer.text
            threading.Event().wait(PAUSE_SECONDS)

    def _keep_submitting(self, number: int) -> None:
        chance = random.Random(self._seed * 1000 + number)
        while not self._ending.is_set():
            [(waiting,)] = self._system.query("SELECT count(*) FROM jobs WHERE state IN ('queued', 'running')")
            if waiting >= WAITING_AT_MOST:
                self._ending.wait(PAUSE_SECONDS)
                continue
            self.submit(chance.choice(self._inputs), as_upload=chance.random() < 0.4)

    def _upload(self, client: httpx2.Client, wanted: Input) -> str:
        announced = client.post("/v1/uploads", json={"filename": wanted.name, "size": len(wanted.body)})
        upload = announced.raise_for_status().json()
        httpx2.put(upload["url"], content=wanted.body, headers=upload["headers"], timeout=20).raise_for_status()
        return str(upload["id"])

    def _post(self, client: httpx2.Client, wanted: Input, key: str, upload_id: str | None) -> httpx2.Response:
        told: dict[str, Any] = {"mode": "demo", "webhook_url": self._webhook_url, "metadata": {"input": wanted.name}}
        headers = {"Idempotency-Key": key}
        if upload_id is not None:
            body = {**told, "options": wanted.options, "source": {"upload_id": upload_id}}
            return client.post("/v1/jobs", json=body, headers=headers)
        form = {**told, "options": json.dumps(wanted.options), "metadata": json.dumps(told["metadata"])}
        return client.post("/v1/jobs", data=form, files={"file": (wanted.name, wanted.body)}, headers=headers)
