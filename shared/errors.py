"""What can go wrong, each with a stable code. HTTP knows these only through the one table in `api/errors.py`."""

import errno
from typing import ClassVar

NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""The `errno` of an OSError for want of room: the disk is full, or a quota is, or the file may not grow."""


class MasklineError(Exception):
    """Base of every refusal and failure of the service; `str(error)` is a sentence for a person."""

    code: ClassVar[str]
    retryable: ClassVar[bool] = False


class NotFound(MasklineError):
    code = "not_found"


class InvalidTransition(MasklineError):
    """The state machine has no such move from where the row is now."""

    code = "invalid_state"


class JobActive(MasklineError):
    code = "job_active"


class NotReady(MasklineError):
    code = "not_ready"


class LeaseLost(MasklineError):
    """The step belongs to another attempt by now; whoever sees this writes nothing more."""

    code = "lease_lost"


class IdempotencyConflict(MasklineError):
    code = "idempotency_in_flight"


class IdempotencyMismatch(MasklineError):
    code = "idempotency_mismatch"


class UploadIncomplete(MasklineError):
    code = "upload_incomplete"


class UploadLost(MasklineError):
    """The storage knows nothing of it any more, so that no further part can make it whole."""

    code = "upload_lost"


class SourceChanged(MasklineError):
    code = "source_changed"


class SourceMissing(MasklineError):
    code = "source_missing"


class SourceRemoved(MasklineError):
    """It was kept for as long as the job had said, or its upload was deleted."""

    code = "source_removed"


class AddressRefused(MasklineError):
    """A URL that the service does not call on a customer's word."""

    code = "address_refused"


class SourceForbidden(MasklineError):
    """A place that the service does not read, or not for this tenant."""

    code = "source_forbidden"


class SourceRefused(MasklineError):
    """The server of a source does not give it to us."""

    code = "source_refused"


class SourceUnreachable(MasklineError):
    code = "source_unreachable"
    retryable = True


class KindMismatch(MasklineError):
    """The file is not what was expected, or the options are not for its kind."""

    code = "kind_mismatch"


class EndpointExists(MasklineError):
    """A tenant has a URL once, or it would be told everything twice."""

    code = "endpoint_exists"


class EndpointDisabled(MasklineError):
    code = "endpoint_disabled"


class TooManyEndpoints(MasklineError):
    code = "too_many_endpoints"


class ModelChanged(MasklineError):
    """Chunks of one recording were made by unlike models; their masks do not belong together."""

    code = "model_changed"


class TooManyBadFrames(MasklineError):
    code = "too_many_bad_frames"


class SourceTooLarge(MasklineError):
    code = "source_too_large"


class StorageUnavailable(MasklineError):
    code = "storage_unavailable"
    retryable = True
