"""The API process: `uvicorn --factory api.main:create_app`."""

import gc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.responses import RedirectResponse
from starlette.middleware.body_limit import RequestBodyLimitMiddleware

from api import errors
from api.deps import Resources
from api.routes import batches, jobs, results, service, uploads, webhooks
from api.schemas import NewJob
from shared import faults, log
from shared.config import Settings, load_settings

VERSION = "0.1.0"
MULTIPART_OVERHEAD_BYTES = 2**20
BATCH_BODY_BYTES = 8 * 2**20  # ten thousand items with some 700 bytes of metadata each


def create_app(settings: Settings | None = None) -> FastAPI:
    """Builds no connection; resources come up with the server and go down with it.

    Without settings given it is the whole of its process, and reads them from the environment.
    """
    owns_process = settings is None
    settings = settings or load_settings()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        log.configure(settings)
        faults.prepare(settings.faults_folder)
        app.state.resources = Resources.build(settings)
        if owns_process:
            gc.freeze()  # what is there from the start stays, and looking through it took a tenth of every request
        yield
        app.state.resources.close()

    app = FastAPI(
        title="Maskline",
        version=VERSION,
        description="Turns images and recordings into segmentation masks, asynchronously and without losing one.",
        lifespan=lifespan,
    )
    errors.install(app)
    app.add_middleware(RequestBodyLimitMiddleware, max_body_size=settings.api.json_body_bytes)
    app.add_middleware(errors.LargeBodiesAsProblems)
    app.include_router(service.router)
    app.include_router(uploads.router)
    app.include_router(jobs.router, max_body_size=settings.api.upload_body_bytes + MULTIPART_OVERHEAD_BYTES)
    app.include_router(results.router)
    app.include_router(batches.router, max_body_size=BATCH_BODY_BYTES)
    app.include_router(webhooks.router)
    app.add_api_route("/", lambda: RedirectResponse("/docs"), include_in_schema=False)
    app.openapi = lambda: _describe(app)  # type: ignore[method-assign]
    return app


def _describe(app: FastAPI) -> dict[str, Any]:
    """The schema, with the models that no signature mentions: the two forms of a submission, and every refusal."""
    if app.openapi_schema is None:
        schema = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        for model in (NewJob, errors.Problem):
            described = model.model_json_schema(ref_template="#/components/schemas/{model}")
            schema["components"]["schemas"] |= described.pop("$defs", {}) | {model.__name__: described}
        app.openapi_schema = schema
    return app.openapi_schema
