"""Settings: read once at process start from `MASKLINE_…` variables, frozen, and passed in.

Groups nest with two underscores: `MASKLINE_STORAGE__BUCKET`. A variable of our prefix that names no setting is
refused, because a misspelt limit must not silently become the default.
"""

import os
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import pydantic_settings
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    IPvAnyNetwork,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, SettingsConfigDict

PREFIX = "MASKLINE_"
CLIENT_VARIABLES = frozenset({"MASKLINE_URL", "MASKLINE_API_KEY", "MASKLINE_HOME"})  # read by the command line alone

Seconds = Annotated[float, Field(gt=0)]
Bytes = Annotated[int, Field(gt=0)]
SourcePlace = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/(.+/)?)?$")]


class SettingsError(Exception):
    """The environment does not describe a valid configuration. The message says which variable and why."""


class Group(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Database(Group):
    url: str = "postgresql+psycopg://maskline@127.0.0.1:5432/maskline"
    pool_size: int = Field(default=10, ge=1)
    pool_wait_seconds: Seconds = 5
    statement_timeout_seconds: Seconds = 15
    lock_timeout_seconds: Seconds = 5


class Broker(Group):
    url: str = "redis://127.0.0.1:6379/0"
    connect_timeout_seconds: Seconds = 3
    socket_timeout_seconds: Seconds = 10


class Storage(Group):
    endpoint_url: str | None = None
    """None is Amazon S3 itself."""
    public_endpoint_url: str | None = None
    """Where clients reach the storage, when that differs from where the servers do; signed links point here."""
    region: str = "us-east-1"
    bucket: str = "maskline"
    access_key: str | None = None
    secret_key: SecretStr | None = None
    link_seconds: int = Field(default=900, ge=1, le=7 * 86400)
    silent_seconds: Seconds = 20
    """How long the storage may send nothing before a request is given up, and made again a few times."""
    sources: tuple[SourcePlace, ...] = ()
    """What jobs may name as `s3://…`: `bucket` or `bucket/prefix/`, and `{tenant}` in it is the name of the tenant.

    Read at the same endpoint with the same keys. Without `{tenant}`, every tenant may read all of it.
    """

    @model_validator(mode="after")
    def _keep_to_ourselves(self) -> Self:
        if any(each.partition("/")[0] == self.bucket for each in self.sources):
            raise ValueError("sources may not name the bucket of the results, which holds every tenant's")
        return self


class Api(Group):
    json_body_bytes: Bytes = 1_000_000
    upload_body_bytes: Bytes = 64 * 2**20
    """The largest file taken through the API itself; larger ones go straight to the storage."""
    source_bytes: int = Field(default=10**12, gt=0, le=5 * 10**12)
    """The largest file there may be; S3's own ceiling is 5 TB."""
    single_upload_bytes: int = Field(default=64 * 2**20, gt=0, le=5 * 10**9)
    """The largest file that one signed PUT brings; larger ones come in parts. S3's own ceiling is 5 GB."""
    part_bytes: int = Field(default=16 * 2**20, ge=5 * 2**20, le=5 * 2**30)
    """The size of a part, or more where 10,000 of them would be too few."""
    upload_seconds: int = Field(default=3600, ge=60)
    """How long signed links to upload are good, and an upload is waited for after the last of them."""
    idempotency_lock_seconds: Seconds = 60
    idempotency_keep_seconds: Seconds = 86400


class Jobs(Group):
    queued_limit: int = Field(default=1_000_000, ge=1)
    """Of all tenants together; beyond it new jobs are refused with 429 until others have begun."""
    start_deadline_seconds: Seconds = 86400
    run_timeout_seconds: Seconds = 6 * 3600
    keep_seconds: Seconds = 30 * 86400
    """How long a job and its result are kept after its end, for tenants that have no rule of their own."""
    keep_sources_seconds: Seconds | None = None
    """The same of sources: uploads, files of forms and what was fetched. None: as long as the results."""
    lost_attempts: int = Field(default=3, ge=1)
    """A step whose worker vanished this often fails with `worker_lost`."""
    failed_attempts: int = Field(default=5, ge=1)
    """A step that met storage or device trouble this often fails with that trouble's code."""


class Worker(Group):
    modes: tuple[str, ...] = ("fast", "balanced", "accurate", "sota", "demo")
    warm_modes: tuple[str, ...] = ()
    device: str = "auto"
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """None: what the device is best at."""
    compile: bool = False
    """Compile the networks: a minute or more for the first image of every input size, less time for the others."""
    model_bytes: Bytes | None = None
    """How much the weights of all models in memory may take; None: half of the device's."""
    lease_seconds: Seconds = 30
    heartbeat_seconds: Seconds = 8
    obey_seconds: Seconds = 300
    """A step that goes on for so long after it was told to stop hangs, and its process is killed to have it back."""
    batch_images: int | None = Field(default=None, ge=1)
    """The most images of several jobs that go through the model together; None: as many as the device gains from.

    A worker holds one step at a time where that is 1, as on a CPU.
    """
    image_pixels: int = Field(default=64_000_000, ge=1)
    source_bytes: Bytes = 5 * 10**9


class Recordings(Group):
    chunk_seconds: Seconds = 60
    """About how long a worker works on one chunk: what the loss of a worker costs at most."""
    frames: int = Field(default=20_000_000, ge=1)
    """The most frames of one recording."""
    duration_seconds: Seconds = 48 * 3600


class Fetch(Group):
    """Of sources that a job names by their URL."""

    source_bytes: Bytes = 200 * 10**9
    total_timeout_seconds: Seconds = 5 * 3600
    connect_timeout_seconds: Seconds = 5
    silent_seconds: Seconds = 30
    """How long a server may send nothing, or next to nothing, before its answer is given up."""
    allow_private_addresses: bool = False
    """Only for sources on the same machine or network; `http://` goes then as well."""


class Upkeep(Group):
    period_seconds: Seconds = 2
    worker_gone_seconds: Seconds = 60
    sweep_seconds: Seconds = 6 * 3600
    """How often all that a tenant has in the storage is compared with what the database knows."""
    sweep_grace_seconds: float = Field(default=86400, ge=600)
    """How old must be what nothing names, before it is removed. No file waits so long for its row."""


class Webhooks(Group):
    total_timeout_seconds: float = Field(default=15, gt=0, le=45)
    """Of one attempt; a sender is taken for dead not long after."""
    connect_timeout_seconds: Seconds = 5
    parallel_sends: int = Field(default=32, ge=2)
    """Of one worker."""
    parallel_sends_per_endpoint: int = Field(default=4, ge=1)
    """Of one worker to one endpoint, or to one host that jobs name; one, while it is slow or not known."""
    endpoints_per_tenant: int = Field(default=20, ge=1)
    secret_grace_seconds: Seconds = 86400
    """How long a secret that was replaced goes on to sign along."""
    keep_seconds: Seconds = 30 * 86400
    """Of deliveries that have ended, and their log."""
    schemes: tuple[Literal["https", "http"], ...] = ()
    """None named: https, and http where private addresses are allowed."""
    ports: tuple[Annotated[int, Field(ge=1, le=65535)], ...] = ()
    """None named: those of the schemes, 443 and 80, and any where private addresses are allowed."""
    private_networks: tuple[IPvAnyNetwork, ...] = ()
    """Where receivers may live besides public addresses, as `["10.1.0.0/16"]`."""
    allow_private_addresses: bool = False
    """All of them: only for a stack whose receivers live on the same machine or network."""


class ModelSource(Group):
    source: str
    """A local folder, or the name of a repository on the hub."""
    revision: str | None = None


class Models(Group):
    """`MASKLINE_MODELS__SOTA__SOURCE=/path` and so on; `cache_folder` and `offline` hold for all of them."""

    cache_folder: Path | None = None
    """None is the libraries' own cache (`HF_HOME`, `TORCH_HOME`)."""
    offline: bool = False
    fast: ModelSource | None = None
    balanced: ModelSource | None = None
    accurate: ModelSource | None = None
    sota: ModelSource | None = None
    demo: ModelSource | None = None

    def sources(self) -> dict[str, ModelSource]:
        """The modes whose source is not the built-in one."""
        named = {name: getattr(self, name) for name in ("fast", "balanced", "accurate", "sota", "demo")}
        return {name: source for name, source in named.items() if source is not None}


class Settings(BaseSettings):
    model_config = SettingsConfigDict(
        env_prefix=PREFIX, env_nested_delimiter="__", frozen=True, extra="forbid", env_ignore_empty=True
    )

    environment: Literal["production", "test"] = "production"
    faults_folder: Path | None = None
    """Where tests arm faults, see `shared/faults.py`; refused unless the environment is `test`."""
    log_format: str = Field(default="console", pattern="^(console|json)$")
    log_level: str = Field(default="info", pattern="^(debug|info|warning|error)$")
    database: Database = Database()
    broker: Broker = Broker()
    storage: Storage = Storage()
    api: Api = Api()
    jobs: Jobs = Jobs()
    worker: Worker = Worker()
    recordings: Recordings = Recordings()
    fetch: Fetch = Fetch()
    upkeep: Upkeep = Upkeep()
    webhooks: Webhooks = Webhooks()
    models: Models = Models()

    @field_validator("faults_folder")
    @classmethod
    def _keep_faults_out_of_production(cls, folder: Path | None, info: ValidationInfo) -> Path | None:
        if folder is not None and info.data.get("environment") != "test":
            raise ValueError("faults are for tests alone; without MASKLINE_ENVIRONMENT=test nothing starts with them")
        return folder

    def describe_engine(self) -> dict[str, Any]:
        """What shared.inference.engine.Engine is made of."""
        return {
            "device": self.worker.device,
            "dtype": self.worker.dtype,
            "compiled": self.worker.compile,
            "model_bytes": self.worker.model_bytes,
            "batch_images": self.worker.batch_images,
            "sources": {name: (each.source, each.revision) for name, each in self.models.sources().items()},
            "cache_folder": self.models.cache_folder,
            "offline": self.models.offline,
        }


def load_settings() -> Settings:
    """Read the environment; raises SettingsError naming the variable that is wrong."""
    groups = {f"{PREFIX}{name.upper()}" for name in Settings.model_fields}
    for variable in os.environ:
        name = variable.upper()  # in either case it would be read
        if name.startswith(PREFIX) and name not in CLIENT_VARIABLES and name.split("__", 1)[0] not in groups:
            raise SettingsError(f"{variable} names no setting of Maskline")
    try:
        return Settings()
    except pydantic_settings.SettingsError as error:
        group = next(name for name in Settings.model_fields if f'"{name}"' in str(error)).upper()
        raise SettingsError(f"{PREFIX}{group}…: is not JSON, as lists and whole groups are given: {error}") from error
    except ValidationError as error:
        lines = (f"{PREFIX}{'__'.join(str(part) for part in e['loc']).upper()}: {e['msg']}" for e in error.errors())
        raise SettingsError("; ".join(lines)) from error
