"""Log lines: one sentence and its fields, for people (`console`) or for machines (`json`)."""

import logging
import sys

import structlog

from shared.config import Settings


def configure(settings: Settings) -> None:
    """Send our lines and those of the libraries to standard error, in one form. Call once, at process start."""
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )
    for_people = structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
    for_machines = structlog.processors.JSONRenderer()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.format_exc_info,
                for_machines if settings.log_format == "json" else for_people,
            ],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(settings.log_level.upper())
    for chatty in ("botocore", "boto3", "urllib3", "httpx2", "httpcore2", "alembic.runtime", "PIL", "kombu", "amqp"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
