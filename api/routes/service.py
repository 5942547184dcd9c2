"""The service about itself: its modes, its workers, whether it is well."""

from typing import Any, Literal

from fastapi import APIRouter, Depends, Response
from pydantic import BaseModel
from sqlalchemy import func, select, text
from sqlalchemy.exc import SQLAlchemyError

from api.deps import Built, Resources, get_tenant
from api.errors import describe_problems
from api.schemas import ModeClass, ModeDescription, WorkerDescription
from shared.errors import StorageUnavailable
from shared.inference.modes import MODES, Mode
from shared.models import Worker

router = APIRouter(tags=["service"])


class Health(BaseModel):
    status: Literal["ok"] = "ok"


class Readiness(BaseModel):
    status: Literal["ready", "degraded", "unavailable"]
    checks: dict[str, str]


@router.get("/healthz")
def get_health() -> Health:
    """The process is alive; it asks nobody else."""
    return Health()


@router.get("/readyz", responses={503: {"model": Readiness}})
def get_readiness(response: Response, resources: Built) -> Readiness:
    """Without its broker the service is slower but loses nothing, so that alone does not take it out of rotation."""
    checks = {
        "database": _check_database(resources),
        "storage": _check_storage(resources),
        "broker": resources.hints.check() or "ok",
    }
    if checks["database"] != "ok" or checks["storage"] != "ok":
        response.status_code = 503
        return Readiness(status="unavailable", checks=checks)
    return Readiness(status="ready" if checks["broker"] == "ok" else "degraded", checks=checks)


@router.get("/v1/modes", responses=describe_problems(401, 503), dependencies=[Depends(get_tenant)])
def list_modes(resources: Built) -> list[ModeDescription]:
    """What each mode is and is not. Label spaces differ; published figures carry their benchmark."""
    served = {mode for worker in _read_live_workers(resources) if worker.queue == "gpu" for mode in worker.modes}
    return [_describe_mode(mode, served=mode.name in served) for mode in MODES.values()]


@router.get("/v1/workers", responses=describe_problems(401, 503), dependencies=[Depends(get_tenant)])
def list_workers(resources: Built) -> list[WorkerDescription]:
    return [
        WorkerDescription.model_validate(
            {**{name: getattr(row, name) for name in WorkerDescription.model_fields if name != "busy"},
             "busy": row.step_id is not None}
        )
        for row in _read_live_workers(resources)
    ]  # fmt: skip


def _describe_mode(mode: Mode, *, served: bool) -> ModeDescription:
    labels = mode.labels
    classes = [
        ModeClass(id=number, name=name, color="#{:02x}{:02x}{:02x}".format(*labels.palette[number]))
        for number, name in enumerate(labels.classes)
    ]
    return ModeDescription(
        name=mode.name, model=mode.title, label_space=labels.name, classes=classes, input_size=mode.input_size,
        licence=mode.licence, commercial_use=mode.commercial_use, quality=_describe_quality(mode), help=mode.help,
        served=served,
    )  # fmt: skip


def _describe_quality(mode: Mode) -> dict[str, Any]:
    return {"benchmark": mode.quality.benchmark, "miou": mode.quality.miou, "note": mode.quality.note}


def _read_live_workers(resources: Resources) -> list[Worker]:
    gone = func.make_interval(0, 0, 0, 0, 0, 0, resources.settings.upkeep.worker_gone_seconds)
    with resources.sessions() as session:
        return list(
            session.scalars(select(Worker).where(Worker.heartbeat_at > func.now() - gone).order_by(Worker.started_at))
        )


def _check_database(resources: Resources) -> str:
    try:
        with resources.sessions() as session:
            session.execute(text("SELECT 1"))
    except SQLAlchemyError as error:
        return f"cannot be reached: {type(error).__name__}"
    return "ok"


def _check_storage(resources: Resources) -> str:
    try:
        resources.storage.check()
    except StorageUnavailable as error:
        return str(error)
    return "ok"
