"""Who gets in: every route of /v1 wants a key that works, and shows its tenant nothing of another's."""

from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import text
from starlette.testclient import TestClient

from shared import tenants
from shared.db import SessionFactory
from shared.models import Batch, Tenant, create_id
from tests.integration.conftest import Submit, authorize, problem

KEYLESS = {"Authorization": ""}


def routes(api: TestClient) -> Iterator[tuple[str, str]]:
    """Every method and path of /v1, as the service itself lists them."""
    for path, operations in api.get("/openapi.json").json()["paths"].items():
        if path.startswith("/v1/"):
            yield from ((method.upper(), path) for method in operations)


def test_every_route_wants_a_key(api: TestClient, subtests: pytest.Subtests) -> None:
    listed = list(routes(api))
    assert len(listed) >= 16
    for method, path in listed:
        with subtests.test(method=method, path=path):
            answer = api.request(method, path, content=b"garbage", headers=KEYLESS)
            problem(answer, 401, "unauthorized")
            assert answer.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("document", [{}, {"mode": "demo", "source": {"upload_id": str(create_id())}}])
def test_who_has_no_key_hears_that_alone_whatever_was_sent(api: TestClient, document: dict[str, Any]) -> None:
    problem(api.post("/v1/jobs", json=document, headers=KEYLESS), 401, "unauthorized")


def test_what_is_not_a_working_key_is_refused(
    api: TestClient, api_key: str, sessions: SessionFactory, subtests: pytest.Subtests
) -> None:
    with sessions.begin() as session:
        stranger = tenants.create_tenant(session, "a stranger")
        other = tenants.create_key(session, stranger.id, name="a stranger's")
    secret = other.split("_")[2]
    for case, authorization in {
        "nothing": "",
        "no scheme": api_key,
        "another scheme": f"Basic {api_key}",
        "no key": "Bearer",
        "not a key": "Bearer secret",
        "a wrong checksum": f"Bearer {api_key[:-1]}{'a' if api_key[-1] != 'a' else 'b'}",
        "cut short": f"Bearer {api_key[:-1]}",
        "more after it": f"Bearer {api_key}x",
        "another's secret": f"Bearer mk_{api_key.split('_')[1]}_{secret}",
        "another case": f"Bearer {api_key.swapcase()}",
        "letters that are none": f"Bearer {api_key[:-1]}é",
    }.items():
        with subtests.test(case):
            answer = api.get("/v1/jobs", headers={b"Authorization": authorization.encode("latin-1")})
            problem(answer, 401, "unauthorized")


def test_a_key_in_the_query_counts_for_nothing(api: TestClient, api_key: str) -> None:
    for name in ("api_key", "key", "access_token", "token", "Authorization"):
        problem(api.get("/v1/jobs", params={name: api_key}, headers=KEYLESS), 401, "unauthorized")


@pytest.mark.parametrize("column", ["revoked_at", "expires_at"])
def test_a_key_that_was_revoked_or_has_expired_is_refused(
    api: TestClient, sessions: SessionFactory, column: str
) -> None:
    assert api.get("/v1/jobs").status_code == 200
    with sessions.begin() as session:
        session.execute(text(f"UPDATE api_keys SET {column} = now()"))  # noqa: S608 - a column's name
    problem(api.get("/v1/jobs"), 401, "unauthorized")


def test_a_key_works_until_it_expires(api: TestClient, sessions: SessionFactory) -> None:
    with sessions.begin() as session:
        session.execute(text("UPDATE api_keys SET expires_at = now() + interval '1 minute'"))
    assert api.get("/v1/jobs").status_code == 200


def test_a_tenant_may_have_several_keys(
    api: TestClient, submit: Submit, sessions: SessionFactory, tenant: Tenant
) -> None:
    job = submit().json()
    with sessions.begin() as session:
        second = tenants.create_key(session, tenant.id, name="a second one")
    assert api.get(job["links"]["self"], headers=authorize(second)).json()["id"] == job["id"]


def test_another_tenants_things_are_not_found_by_any_route(
    api: TestClient,
    submit: Submit,
    sessions: SessionFactory,
    tenant: Tenant,
    foreign: dict[str, str],
    subtests: pytest.Subtests,
) -> None:
    job = submit().json()
    with sessions.begin() as session:
        batch = Batch(tenant_id=tenant.id, name="a batch", mode="demo", options={})
        session.add(batch)
    upload = api.post("/v1/uploads", json={"filename": "a.png", "size": 5}).json()
    endpoint = api.post("/v1/webhooks", json={"url": "https://receiver.example"}).json()["id"]
    delivery = api.post(f"/v1/webhooks/{endpoint}/ping").json()["id"]
    ids = {
        "job_id": job["id"], "upload_id": upload["id"], "batch_id": batch.id, "name": "mask.png", "number": 0,
        "endpoint_id": endpoint, "delivery_id": delivery,
    }  # fmt: skip
    asked = [(method, path.format(**ids)) for method, path in routes(api) if "{" in path]
    assert len(asked) >= 8
    for method, path in asked:
        with subtests.test(method=method, path=path):
            body = {"numbers": [1]} if path.endswith("/parts") else {}  # or it would be refused for having none
            problem(api.request(method, path, json=body, headers=foreign), 404, "not_found")
    assert api.get(job["links"]["self"]).json()["state"] == "queued"
    assert api.get(f"/v1/uploads/{upload['id']}").status_code == 200
    assert api.get(f"/v1/webhooks/{endpoint}").status_code == 200


def test_another_tenants_upload_is_not_found_by_a_submission(api: TestClient, foreign: dict[str, str]) -> None:
    upload = api.post("/v1/uploads", json={"filename": "a.png", "size": 5}).json()
    wanted: dict[str, Any] = {"mode": "demo", "source": {"upload_id": upload["id"]}}
    problem(api.post("/v1/jobs", json=wanted, headers=foreign), 404, "not_found")


def test_a_tenants_signing_secret_is_its_own(api: TestClient, tenant: Tenant, foreign: dict[str, str]) -> None:
    assert api.get("/v1/webhooks/secret").json() == {"secret": tenant.webhook_secret}
    assert api.get("/v1/webhooks/secret", headers=foreign).json() != {"secret": tenant.webhook_secret}


def test_a_local_stack_keeps_its_key_for_as_long_as_it_works(sessions: SessionFactory) -> None:
    first = tenants.ensure_local_tenant(sessions, api_key=None)
    assert tenants.ensure_local_tenant(sessions, api_key=first.api_key) == first
    with sessions.begin() as session:
        session.execute(text("UPDATE api_keys SET revoked_at = now()"))
    second = tenants.ensure_local_tenant(sessions, api_key=first.api_key)
    assert second.api_key != first.api_key
    assert second.webhook_secret == first.webhook_secret, "it is the same tenant"
