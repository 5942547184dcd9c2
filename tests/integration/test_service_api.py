"""The service about itself: its modes, its workers, its description."""

from collections.abc import Iterator
from typing import Any

from sqlalchemy import text
from starlette.testclient import TestClient

from shared.db import SessionFactory
from tests.integration.conftest import add_worker, make_late

PROBLEM = {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}}
ROUTES = {
    "/healthz": {"get"},
    "/readyz": {"get"},
    "/v1/batches": {"get", "post"},
    "/v1/batches/{batch_id}": {"get", "delete"},
    "/v1/batches/{batch_id}/cancel": {"post"},
    "/v1/batches/{batch_id}/retry-failed": {"post"},
    "/v1/jobs": {"get", "post"},
    "/v1/jobs/{job_id}": {"get", "delete"},
    "/v1/jobs/{job_id}/cancel": {"post"},
    "/v1/jobs/{job_id}/retry": {"post"},
    "/v1/jobs/{job_id}/events": {"get"},
    "/v1/jobs/{job_id}/result": {"get"},
    "/v1/jobs/{job_id}/files/{name}": {"get"},
    "/v1/jobs/{job_id}/frames/{number}.png": {"get"},
    "/v1/uploads": {"post"},
    "/v1/uploads/{upload_id}": {"get", "delete"},
    "/v1/uploads/{upload_id}/complete": {"post"},
    "/v1/uploads/{upload_id}/parts": {"post"},
    "/v1/modes": {"get"},
    "/v1/workers": {"get"},
    "/v1/webhooks": {"get", "post"},
    "/v1/webhooks/secret": {"get"},
    "/v1/webhooks/deliveries": {"get"},
    "/v1/webhooks/deliveries/{delivery_id}/redeliver": {"post"},
    "/v1/webhooks/{endpoint_id}": {"get", "patch", "delete"},
    "/v1/webhooks/{endpoint_id}/deliveries": {"get"},
    "/v1/webhooks/{endpoint_id}/ping": {"post"},
    "/v1/webhooks/{endpoint_id}/rotate-secret": {"post"},
}


def test_every_mode_says_what_it_is_and_is_not(api: TestClient) -> None:
    modes = {mode["name"]: mode for mode in api.get("/v1/modes").json()}
    assert list(modes) == ["fast", "balanced", "accurate", "sota", "demo"]
    assert {name: (mode["label_space"], len(mode["classes"])) for name, mode in modes.items() if name != "demo"} == {
        "fast": ("voc", 21), "balanced": ("voc", 21), "accurate": ("ade20k", 151), "sota": ("ade20k", 151),
    }  # fmt: skip
    assert {name: mode["quality"]["miou"] for name, mode in modes.items() if name != "demo"} == {
        "fast": 60.3, "balanced": 66.4, "accurate": 49.4, "sota": 56.1,
    }  # fmt: skip
    assert {name: mode["input_size"] for name, mode in modes.items() if name in ("fast", "accurate", "sota")} == {
        "fast": 512, "accurate": 512, "sota": 1024,
    }  # fmt: skip
    assert (modes["accurate"]["commercial_use"], modes["demo"]["commercial_use"]) == (False, True)


def test_a_class_has_the_id_that_masks_hold_and_a_colour(api: TestClient) -> None:
    for mode in api.get("/v1/modes").json():
        assert [each["id"] for each in mode["classes"]] == list(range(len(mode["classes"])))
        assert all(len(each["color"]) == 7 and each["name"] for each in mode["classes"])


def test_a_mode_is_served_while_a_worker_that_lives_runs_it(api: TestClient, sessions: SessionFactory) -> None:
    def served() -> list[str]:
        return [mode["name"] for mode in api.get("/v1/modes").json() if mode["served"]]

    assert served() == []
    add_worker(sessions, modes=["demo", "sota"])
    assert served() == ["sota", "demo"]
    with sessions.begin() as session:
        session.execute(text("UPDATE workers SET heartbeat_at = now() - interval '1 hour'"))
    assert served() == []


def test_workers_are_listed_while_they_live(api: TestClient, sessions: SessionFactory) -> None:
    row = add_worker(sessions, mode_loaded="demo")
    [listed] = api.get("/v1/workers").json()
    assert (listed["id"], listed["host"], listed["mode_loaded"], listed["busy"]) == (
        str(row.id),
        "a host",
        "demo",
        False,
    )
    with sessions.begin() as session:
        make_late(session, "workers", "heartbeat_at")
        session.execute(text("UPDATE workers SET step_id = id"))
    assert api.get("/v1/workers").json()[0]["busy"] is True


def test_the_description_names_every_route(api: TestClient) -> None:
    described = api.get("/openapi.json").json()
    assert described["openapi"].startswith("3.")
    assert {path: set(operations) for path, operations in described["paths"].items()} == ROUTES


def test_the_description_says_how_each_route_refuses(api: TestClient) -> None:
    for path, operations in api.get("/openapi.json").json()["paths"].items():
        for method, operation in operations.items():
            refusals = {int(status): each for status, each in operation["responses"].items() if int(status) >= 400}
            if path.startswith("/v1/"):
                assert set(refusals) >= {401, 503}, (method, path)
                assert all(each["content"] == PROBLEM for each in refusals.values()), (method, path)
                assert operation["security"] == [{"HTTPBearer": []}], (method, path)
            if "_id}" in path:
                assert 404 in refusals, (method, path)


def test_everything_the_description_refers_to_is_in_it(api: TestClient) -> None:
    described = api.get("/openapi.json").json()
    referred = {each.removeprefix("#/components/schemas/") for each in references(described)}
    assert referred >= {"Job", "NewJob", "Problem", "Upload"}
    assert referred <= set(described["components"]["schemas"])


def references(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        if "$ref" in node:
            yield node["$ref"]
        for each in node.values():
            yield from references(each)
    elif isinstance(node, list):
        for each in node:
            yield from references(each)


def test_the_root_leads_people_to_the_documentation(api: TestClient) -> None:
    assert api.get(api.get("/").headers["location"]).headers["content-type"].startswith("text/html")
