"""What all tests share: one set of real servers for the whole run."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from cli.servers import Servers, run_servers


@pytest.fixture(scope="session")
def servers() -> Iterator[Servers]:
    """PostgreSQL, Redis and S3, as `maskline up` runs them, in a folder that goes with the run."""
    # Not under pytest's own folder: it keeps the last runs, 50 MB each, and closes it to the user PostgreSQL runs as.
    folder = Path(tempfile.mkdtemp(prefix="maskline-"))
    try:
        with run_servers(folder, durable=False) as running:
            yield running
    finally:
        shutil.rmtree(folder)
