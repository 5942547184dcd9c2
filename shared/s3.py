"""How S3 is spoken to: the client with its limits in time, and what its errors mean to us. Buckets are `storage.py`."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any

import boto3
from boto3.exceptions import Boto3Error
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from shared import config
from shared.errors import SourceChanged, SourceMissing, StorageUnavailable

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client


def create_client(settings: config.Storage, endpoint_url: str | None) -> "S3Client":
    """Opens no connection."""
    return boto3.client(
        "s3",
        endpoint_url=endpoint_url,
        region_name=settings.region,
        aws_access_key_id=settings.access_key,
        aws_secret_access_key=settings.secret_key.get_secret_value() if settings.secret_key else None,
        config=Config(
            signature_version="s3v4",  # the default signer leaves the length of an upload unsigned
            connect_timeout=3,
            read_timeout=settings.silent_seconds,
            retries={"mode": "standard", "max_attempts": 3},
            max_pool_connections=16,
            request_checksum_calculation="when_required",  # other providers refuse the newer trailers
            response_checksum_validation="when_required",
        ),
    )


def status(error: ClientError) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def tell_time(answer: Any) -> datetime | None:
    """By the clock of the storage that answered, if it said; ours may go wrong by hours, and files hang on it."""
    told = answer["ResponseMetadata"]["HTTPHeaders"].get("date")
    try:
        moment = parsedate_to_datetime(told) if told else None
    except ValueError:
        return None
    return moment if moment is not None and moment.tzinfo is not None else None


@contextmanager
def translated() -> Iterator[None]:
    """Raises SourceMissing, SourceChanged and StorageUnavailable where the libraries have errors of their own."""
    try:
        yield
    except ClientError as error:
        if status(error) == 404:
            raise SourceMissing("the object is not in the storage") from error
        if status(error) == 412:
            raise SourceChanged("the source was replaced after the job was submitted") from error
        raise StorageUnavailable(f"the storage answered {error.response.get('Error', {}).get('Code')}") from error
    except (BotoCoreError, Boto3Error) as error:
        raise StorageUnavailable(f"the storage cannot be reached: {type(error).__name__}") from error
