"""Where the recordings of an archive come from: a folder, whose files are uploaded, or a bucket that the service reads.

Both give jobs; what then happens to these is `cli/recordings.py`, and what a second run has to know `cli/journal.py`.
"""

import uuid
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path

from cli.client import TERMINAL, Client, Json
from cli.exchange import ApiError
from cli.failures import Failure
from cli.folder import search
from cli.journal import Entry, Journal
from cli.recordings import NOT_A_RECORDING, Recording, Row, Work, is_other
from cli.tables import printable
from cli.uploads import GONE

PRIORITY = -10
"""As of a batch: whoever waits for a single job does not wait for a whole archive first."""
AGAIN = frozenset({"failed", "canceled", "expired"})
BATCH_NAME_LENGTH = 200


class Folder:
    """The recordings of a folder: uploaded, and submitted one by one as they arrive."""

    def __init__(self, folder: Path, client: Client, journal: Journal, work: Work) -> None:
        self._folder, self._client, self._journal, self._work = folder, client, journal, work

    def begin(self) -> None:
        found, rows = search(self._folder), self._work.rows
        there = {*found.recordings, *found.others}
        # Whoever deletes a recording once it is submitted still wants its masks.
        away = [each.name for each in self._journal.entries() if each.name not in there and each.job_id is not None]
        rows += [Row(name=name, state=NOT_A_RECORDING) for name in found.others]
        rows += [
            Row(name=name, state="failed", says=f"unreadable: {why}")
            for name, why in found.unreadable.items()
            if name not in away
        ]
        entries = [self._recall(name) for name in (*found.recordings, *away)]
        left = [entry for entry in entries if not self._work.show_if_complete(entry)]
        # Those with a job have nothing to upload, and shall not wait for those that have.
        for entry in sorted(left, key=lambda entry: entry.job_id is None):
            self._work.bring(Recording(name=entry.name, size_bytes=entry.size_bytes), self._bring)

    def look(self) -> bool:
        jobs = [(each, each.job) for each in self._work.open.values() if each.job is not None]
        following = [(recording, job) for recording, job in jobs if job["state"] not in TERMINAL]
        if not following:
            return False
        first = min(datetime.fromisoformat(job["created_at"]) for _, job in following) - timedelta(milliseconds=1)
        listed = self._client.list_jobs(limit=None, kind="recording", created_after=first.isoformat())
        now = {job["id"]: job for job in listed}
        for recording, job in following:
            seen = now.get(job["id"]) or self._find_job(job["id"])
            if seen is not None:
                self._work.see(recording, seen)
            else:
                self._lose(recording)
        return False

    def _lose(self, recording: Recording) -> None:
        if recording.lost:
            self._work.end(Row(name=recording.name, state="failed", says="not_found: its job was deleted twice"))
            return
        recording.lost = True
        self._work.bring(recording, self._bring)

    def _recall(self, name: str) -> Entry:
        """What is known of the recording as it is now; one that was changed is another."""
        entry = self._journal.read(name)
        try:
            now = (self._folder / name).stat()
        except OSError:  # told once it is to be sent, which it need not be if it has a job
            return entry or Entry(name=name, size_bytes=None)
        if entry is not None and (entry.size_bytes, entry.mtime_ns) == (now.st_size, now.st_mtime_ns):
            return entry
        return Entry(name=name, size_bytes=now.st_size, mtime_ns=now.st_mtime_ns)

    # --- in threads of their own ------------------------------------------------------------------------------------

    def _bring(self, recording: Recording) -> Json:
        entry = self._recall(recording.name)
        try:
            if entry.job_id is not None:
                job = self._take_up(recording, entry.job_id)
                if job["state"] not in AGAIN:
                    return job
                entry = replace(entry, submission=entry.submission + 1, job_id=None)
                self._journal.write(entry)
            return self._send(recording, entry)
        except ApiError as error:
            if error.code not in GONE:
                raise
        # The service has forgotten the job, or an upload that was begun: it is all done anew, once.
        return self._send(recording, replace(entry, upload_id=None, submission=0, job_id=None))

    def _take_up(self, recording: Recording, job_id: str) -> Json:
        """The job of an earlier run; if it is one of AGAIN, the same job would only end so again."""
        job = self._work.persist(recording, lambda: self._client.get(job_id))
        if job["state"] in AGAIN and (job["error"] is None or job["error"]["retryable"]):
            return self._work.persist(recording, lambda: self._client.retry(job_id))
        return job

    def _send(self, recording: Recording, entry: Entry) -> Json:
        """Upload what is missing, and submit."""
        path, settings = self._folder / entry.name, self._journal.common

        def announce(upload_id: str) -> None:
            nonlocal entry
            entry = replace(entry, upload_id=upload_id, submission=0, job_id=None)
            self._journal.write(entry)

        def upload() -> str:
            recording.sent_bytes = 0
            return self._client.upload(
                path, begun=entry.upload_id, on_announced=announce,
                on_bytes=lambda count: self._work.count_sent(recording, count),
            )  # fmt: skip

        upload_id = self._work.persist(recording, upload)
        sent = path.stat()
        if (sent.st_size, sent.st_mtime_ns) != (entry.size_bytes, entry.mtime_ns):
            raise Failure("it was written to while it was uploaded; the next run sends it anew")
        job = self._work.persist(
            recording,
            lambda: self._client.submit_upload(
                upload_id, idempotency_key=entry.idempotency_key, mode=settings.mode, options=settings.options,
                priority=PRIORITY, metadata={"path": printable(entry.name)},
            ),
        )  # fmt: skip
        self._journal.write(replace(entry, job_id=job["id"]))
        return job

    def _find_job(self, job_id: str) -> Json | None:
        try:
            return self._client.get(job_id)
        except ApiError as error:
            if error.status != 404:
                raise
            return None


class Prefix:
    """The recordings below a prefix of a bucket, which the service reads by itself: one batch, listed once."""

    def __init__(self, client: Client, journal: Journal, work: Work) -> None:
        self._client, self._journal, self._work = client, journal, work
        self._batch_id = ""
        self._settled: set[str] = set()
        """What has a row already, from a run before this one or because of its name."""

    def begin(self) -> None:
        batch_id = self._journal.common.batch_id
        if batch_id is not None and self._knows(batch_id):
            self._batch_id = batch_id
            self._retry_failed()
            return
        if batch_id is not None:
            # It would be computed again for nothing if all is here.
            entries = self._journal.entries()
            if entries and all(self._work.show_if_complete(each) for each in entries):
                return
            self._work.rows.clear()
            again = replace(self._journal.common, batch_id=None, batch_key=f"archive-{uuid.uuid4().hex}")
            self._journal.keep(again)
        self._submit()

    def look(self) -> bool:
        if not self._batch_id:
            return False
        # Before its jobs: those of a batch that is completed are all there.
        more = bool(self._client.get_batch(self._batch_id)["state"] != "completed")
        jobs = self._client.list_jobs(limit=None, batch_id=self._batch_id)
        for job in reversed(jobs):
            self._see(job)
        if not more:
            self._tell_purged({self._name(job) for job in jobs})
        return more

    def _submit(self) -> None:
        common = self._journal.common
        batch = self._client.submit_batch(
            idempotency_key=common.batch_key, name=common.source[:BATCH_NAME_LENGTH], mode=common.mode,
            options=common.options, prefix=common.source, expect="recording",
        )  # fmt: skip
        self._batch_id = batch["id"]
        self._journal.keep(replace(common, batch_id=self._batch_id))

    def _knows(self, batch_id: str) -> bool:
        try:
            self._client.get_batch(batch_id)
        except ApiError as error:
            if error.status != 404:
                raise
            return False
        return True

    def _retry_failed(self) -> None:
        jobs = self._client.list_jobs(limit=None, batch_id=self._batch_id)
        if any(job["state"] in AGAIN and not is_other(job) for job in jobs):
            self._client.retry_failed(self._batch_id)

    def _see(self, job: Json) -> None:
        name = self._name(job)
        if name in self._settled or (name in self._work.recordings and name not in self._work.open):
            return
        recording = self._work.open.get(name)
        if recording is None:
            try:
                self._work.place(name)
            except Failure as error:
                self._settled.add(name)
                self._work.end(Row(name=name, state="failed", says=str(error)))
                return
            size = job["source"]["size_bytes"]
            entry = self._journal.read(name)
            if entry is None or entry.job_id != job["id"]:
                entry = Entry(name=name, size_bytes=size, job_id=job["id"])
                self._journal.write(entry)
            if self._work.show_if_complete(entry):
                self._settled.add(name)
                return
            recording = Recording(name=name, size_bytes=size)
        if is_other(job):
            self._journal.forget(name)
        self._work.see(recording, job)

    def _tell_purged(self, listed: set[str]) -> None:
        """Of jobs that the service does not keep any more, there are results here, or none at all."""
        for entry in self._journal.entries():
            if entry.name in listed or entry.name in self._settled:
                continue
            self._settled.add(entry.name)
            if not self._work.show_if_complete(entry):
                says = "not_found: the service does not keep its job any more; choose another --out to do it anew"
                self._work.end(Row(name=entry.name, state="failed", says=says))

    def _name(self, job: Json) -> str:
        source = job["source"]
        location = source["location"] or source["filename"]
        return str(location).removeprefix(self._journal.common.source)
