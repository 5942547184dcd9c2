"""What must be true in the end, of the database, the storage and the receiver, whatever was killed on the way."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

from shared.storage import Storage
from tests.chaos.system import System
from tests.receiver import Receiver

WHOLE = 2**30
TIMED = frozenset({"manifest.json"})
"""Files that tell how long it took."""

Digests = dict[str, str]


def check(
    system: System, accepted: Mapping[str, str], expected: Mapping[str, Digests], receiver: Receiver
) -> dict[str, Any]:
    """`accepted` is the input by job id, `expected` the digests of its files by input."""
    rows = {
        job_id: (state, error)
        for job_id, state, error in system.query("SELECT id::text, state, error->>'code' FROM jobs")
    }
    ended_otherwise = Counter(
        str(rows[job_id][1] or rows[job_id][0])
        for job_id in accepted
        if job_id in rows and rows[job_id][0] != "succeeded"
    )
    successes = Counter(
        job_id
        for (job_id,) in system.query(
            "SELECT job_id::text FROM job_events WHERE type = 'state' AND data->>'state' = 'succeeded'"
        )
    )
    webhook_ids: dict[str, set[str]] = {job_id: set() for job_id in accepted}
    for delivery in list(receiver.deliveries):
        event = json.loads(delivery.body)
        webhook_ids.setdefault(event["data"]["id"], set()).add(delivery.webhook_id)
    left = len(system.storage().list_keys(""))
    system.sweep()
    kept = system.storage().list_keys("")
    found = read_digests(system, accepted)
    return {
        "jobs_accepted": len(accepted),
        "jobs_lost": sum(job_id not in rows or rows[job_id][0] != "succeeded" for job_id in accepted),
        "ended_otherwise": dict(ended_otherwise),
        "duplicate_results": len(rows.keys() - accepted.keys()) + sum(times - 1 for times in successes.values()),
        "duplicate_webhook_ids": sum(max(0, len(ids) - 1) for ids in webhook_ids.values()),
        "missing_webhooks": sum(not ids for ids in webhook_ids.values()),
        "masks_differing_from_quiet_run": sum(
            found.get(job_id) != expected_of(accepted, expected, job_id) for job_id in accepted
        ),
        "orphans_swept": left - len(kept),
        "orphans_beyond_policy": len(_find_orphans(system, kept)),
    }


def expected_of(accepted: Mapping[str, str], expected: Mapping[str, Digests], job_id: str) -> Digests:
    """Of the same input, made while nobody was killed."""
    first = next(each for each in expected if accepted.get(each) == accepted[job_id])
    return expected[first]


def read_digests(system: System, accepted: Mapping[str, str]) -> dict[str, Digests]:
    """SHA-256 of every file of every result by job, of the bytes that lie in the storage."""
    storage = system.storage()
    manifests = system.query("SELECT id::text, manifest_key FROM jobs WHERE state = 'succeeded'")
    return {job_id: _digest(storage, key) for job_id, key in manifests if job_id in accepted}


def _digest(storage: Storage, manifest_key: str) -> Digests:
    """Raises AssertionError for a file that is not what its manifest says."""
    manifest = json.loads(storage.read(manifest_key, limit_bytes=WHOLE))
    digests = {}
    for file in manifest["files"]:
        body = storage.read(file["key"], limit_bytes=WHOLE)
        digests[file["name"]] = hashlib.sha256(body).hexdigest()
        assert (len(body), digests[file["name"]]) == (file["size"], file["sha256"]), f"{file['key']} is another file"
    return {name: digest for name, digest in digests.items() if name not in TIMED}


def _find_orphans(system: System, keys: list[str]) -> list[str]:
    """Keys that neither a row nor a manifest names."""
    storage = system.storage()
    manifests = [key for (key,) in system.query("SELECT manifest_key FROM jobs WHERE manifest_key IS NOT NULL")]
    named = {
        *manifests,
        *(key for (key,) in system.query("SELECT storage_key FROM uploads")),
        *(source["key"] for (source,) in system.query("SELECT source FROM jobs")),
        *(file["key"] for each in manifests for file in json.loads(storage.read(each, limit_bytes=WHOLE))["files"]),
    }
    told = " ".join(json.dumps(row) for row in system.query("SELECT recording FROM jobs"))
    told += " ".join(json.dumps(row) for row in system.query("SELECT plan, result FROM steps"))
    return [key for key in keys if key not in named and f'"{key}"' not in told]
