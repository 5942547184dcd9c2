"""Pages of lists, the newest first: a cursor names the last row of the page before, so nothing shifts meanwhile."""

import uuid
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Sequence
from datetime import datetime

from api.errors import InvalidRequest
from shared.models import Batch, Job, WebhookDelivery


def next_cursor(rows: Sequence[Job | Batch | WebhookDelivery], *, limit: int) -> str | None:
    """For the page after the first `limit` of `rows`; None when there are no more."""
    if len(rows) <= limit:
        return None
    last = rows[limit - 1]
    return urlsafe_b64encode(f"{last.created_at.isoformat()} {last.id}".encode()).decode()


def read_cursor(cursor: str) -> tuple[datetime, uuid.UUID]:
    """Raises InvalidRequest."""
    try:
        moment, row_id = urlsafe_b64decode(cursor.encode()).decode().split(" ")
        created_at = datetime.fromisoformat(moment)
        if created_at.tzinfo is None:
            raise ValueError("no time zone")
        return created_at, uuid.UUID(row_id)
    except ValueError as error:
        raise InvalidRequest("the cursor is not one that this service gave out") from error
