"""Settings from the environment: read once, frozen, and refused with a sentence that names the variable."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from shared.config import Settings, SettingsError, load_settings


def test_without_any_variable_everything_has_its_default(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = load_settings()
    assert settings == Settings()
    assert settings.database.url.startswith("postgresql+psycopg://")


def test_a_setting_of_a_group_is_named_with_two_underscores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASKLINE_STORAGE__BUCKET", "masks")
    monkeypatch.setenv("MASKLINE_API__UPLOAD_BODY_BYTES", "1000")
    monkeypatch.setenv("MASKLINE_LOG_FORMAT", "json")
    settings = load_settings()
    assert (settings.storage.bucket, settings.api.upload_body_bytes, settings.log_format) == ("masks", 1000, "json")


def test_lists_are_given_as_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASKLINE_WORKER__MODES", '["demo", "fast"]')
    assert load_settings().worker.modes == ("demo", "fast")


@pytest.mark.parametrize("sources", ['["UPPER"]', '["bucket/prefix"]', '["s3://bucket"]', '["masks/a/"]', "bucket"])
def test_sources_are_buckets_and_folders_in_them_and_never_the_bucket_of_the_results(
    monkeypatch: pytest.MonkeyPatch, sources: str
) -> None:
    monkeypatch.setenv("MASKLINE_STORAGE__BUCKET", "masks")
    monkeypatch.setenv("MASKLINE_STORAGE__SOURCES", '["footage", "films/{tenant}/"]')
    assert load_settings().storage.sources == ("footage", "films/{tenant}/")
    monkeypatch.setenv("MASKLINE_STORAGE__SOURCES", sources)
    with pytest.raises(SettingsError, match="MASKLINE_STORAGE"):
        load_settings()


def test_a_mode_can_be_read_from_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASKLINE_MODELS__SOTA__SOURCE", "/models/sota")
    monkeypatch.setenv("MASKLINE_MODELS__CACHE_FOLDER", "/models/cache")
    models = load_settings().models
    assert {name: each.source for name, each in models.sources().items()} == {"sota": "/models/sota"}
    assert models.cache_folder == Path("/models/cache")


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("MASKLINE_STORAG__BUCKET", "masks"),
        ("MASKLINE_STORAGE__BUKET", "masks"),
        ("MASKLINE_STORAGE_BUCKET", "masks"),
        ("MASKLINE_DATABASE_URL", "postgresql://"),
        ("MASKLINE_DEBUG", "1"),
        ("maskline_storag__bucket", "masks"),
        ("MASKLINE_DATABASE__POOL_SIZE", "many"),
        ("MASKLINE_DATABASE__POOL_SIZE", "0"),
        ("MASKLINE_JOBS__KEEP_SECONDS", "-1"),
        ("MASKLINE_STORAGE__LINK_SECONDS", "604801"),
        ("MASKLINE_LOG_LEVEL", "loud"),
        ("MASKLINE_MODELS__OFFLINE", "perhaps"),
        ("MASKLINE_MODELS__SOTA__FOLDER", "/models"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, variable: str, value: str) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(SettingsError, match=variable):
        load_settings()


def test_what_should_be_json_and_is_not_is_refused_with_its_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASKLINE_WORKER__MODES", "demo")
    with pytest.raises(SettingsError, match="MASKLINE_WORKER"):
        load_settings()


def test_everything_that_is_wrong_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASKLINE_DATABASE__POOL_SIZE", "many")
    monkeypatch.setenv("MASKLINE_LOG_LEVEL", "loud")
    with pytest.raises(SettingsError, match=r"(?s)POOL_SIZE.*LOG_LEVEL|LOG_LEVEL.*POOL_SIZE"):
        load_settings()


def test_variables_of_the_command_line_are_not_the_services(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASKLINE_URL", "http://127.0.0.1:8000")
    monkeypatch.setenv("MASKLINE_API_KEY", "mk_")
    assert load_settings() == Settings()


def test_an_empty_variable_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASKLINE_STORAGE__ENDPOINT_URL", "")
    assert load_settings().storage.endpoint_url is None


@pytest.mark.parametrize("environment", [None, "", "production"])
def test_faults_are_refused_in_production_and_whatever_is_not_called_a_test(
    monkeypatch: pytest.MonkeyPatch, environment: str | None
) -> None:
    monkeypatch.setenv("MASKLINE_FAULTS_FOLDER", "/faults")
    if environment is not None:
        monkeypatch.setenv("MASKLINE_ENVIRONMENT", environment)
    with pytest.raises(SettingsError, match=r"MASKLINE_FAULTS_FOLDER.*tests alone"):
        load_settings()
    monkeypatch.setenv("MASKLINE_ENVIRONMENT", "test")
    assert load_settings().faults_folder == Path("/faults")


def test_settings_do_not_change(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = load_settings()
    with pytest.raises(ValidationError):
        settings.storage.bucket = "another"  # type: ignore[misc]


def test_a_secret_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASKLINE_STORAGE__SECRET_KEY", "open sesame")
    settings = load_settings()
    assert "sesame" not in repr(settings)
    assert "sesame" not in settings.model_dump_json()
