"""What is said of the modes and their weights, without a network."""

import json
from pathlib import Path

import pytest

from cli import doctor
from tests.unit.cli.conftest import Maskline


@pytest.fixture(autouse=True)
def _no_weights(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASKLINE_MODELS__CACHE_FOLDER", str(folder / "cache"))


def test_every_mode_is_listed_with_its_licence_and_where_its_weights_are(maskline: Maskline) -> None:
    done = maskline("models", "list", "--json")
    rows = {row["mode"]: row for row in json.loads(done.out)}
    assert list(rows) == ["fast", "balanced", "accurate", "sota", "demo"]
    assert rows["accurate"]["commercial_use"] is False
    assert "non-commercial" in rows["accurate"]["licence"]
    assert Path(rows["demo"]["path"], "model.safetensors").is_file()
    assert rows["sota"]["path"] is None
    assert rows["sota"]["advice"] == "run: maskline models pull sota"


def test_the_table_says_the_same(maskline: Maskline) -> None:
    done = maskline("models", "list")
    assert done.status == 0
    assert "run: maskline models pull sota" in done.out


def test_a_folder_that_takes_a_models_place_is_shown(
    maskline: Maskline, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "mine").mkdir()
    (folder / "mine" / "model.safetensors").write_bytes(b"weights")
    monkeypatch.setenv("MASKLINE_MODELS__SOTA__SOURCE", str(folder / "mine"))
    rows = {row["mode"]: row for row in json.loads(maskline("models", "list", "--json").out)}
    assert rows["sota"]["path"] == str(folder / "mine")


def test_pulling_what_is_there_says_where(maskline: Maskline) -> None:
    done = maskline("models", "pull", "demo")
    assert done.status == 0
    assert done.out.startswith("demo ")


def test_what_cannot_be_pulled_is_told_by_its_name(
    maskline: Maskline, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MASKLINE_MODELS__SOTA__SOURCE", str(folder / "nothing-here"))
    done = maskline("models", "pull", "sota", "demo")
    assert done.status == 1
    assert done.out.startswith("demo ")
    assert "maskline: The model of mode sota is not available" in done.err
    assert done.err.count("\n") == 1


def test_the_doctor_misses_a_choice_and_not_a_necessity() -> None:
    findings = {each.subject: each for each in doctor.examine_weights()}
    assert findings["weights demo"].mark == "✓"
    assert findings["weights sota"].mark == "–"
    assert "maskline models pull sota" in findings["weights sota"].says
