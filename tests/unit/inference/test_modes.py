"""The table of modes: consistent with its label spaces, honest, and readable without torch."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import shared.inference
from shared.inference.errors import InferenceError, InvalidMedia, MediaLimit, ModelUnavailable, OutOfMemory
from shared.inference.labels import ADE20K, DEMO, LABEL_SPACES, VOC
from shared.inference.modes import MODES, Mode

PACKAGE = Path(shared.inference.__file__).parent


def test_the_table_of_modes_is_readable_without_torch() -> None:
    code = (
        "import sys; import shared.inference.modes, shared.inference.labels, shared.inference.errors; "
        "print(sorted({'torch', 'torchvision', 'transformers', 'numpy', 'PIL', 'huggingface_hub'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parents[1]
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("mode", MODES.values(), ids=lambda mode: str(mode.name))
def test_a_mode_points_every_channel_at_a_class(mode: Mode) -> None:
    assert MODES[mode.name] is mode
    assert mode.channels + mode.channel_offset == len(mode.labels.classes) <= 256
    assert mode.labels is LABEL_SPACES[mode.label_space]
    assert mode.input_size % 32 == 0
    assert mode.help
    assert mode.licence
    assert 0 < mode.quality.miou < 100


@pytest.mark.parametrize("space", LABEL_SPACES.values(), ids=lambda space: str(space.name))
def test_a_label_space_names_and_paints_each_id_once(space: type(VOC)) -> None:  # type: ignore[valid-type]
    assert len(space.palette) == len(space.classes)
    assert len(set(space.classes)) == len(space.classes)
    assert space.palette[0] == (0, 0, 0)
    assert all(0 <= part <= 255 for colour in space.palette for part in colour)


def test_the_ids_follow_the_data_sets_own_files() -> None:
    assert (VOC.classes[0], VOC.classes[15], VOC.classes[20]) == ("background", "person", "tvmonitor")
    assert (VOC.palette[1], VOC.palette[15]) == ((128, 0, 0), (192, 128, 128))
    assert len(ADE20K.classes) == 151
    assert (ADE20K.classes[0], ADE20K.classes[1], ADE20K.classes[13]) == ("unlabeled", "wall", "person")
    assert (ADE20K.classes[21], ADE20K.classes[150]) == ("car", "flag")
    assert len(DEMO.classes) == 10
    assert (MODES["fast"].channel_offset, MODES["sota"].channel_offset) == (0, 1)


def test_the_licence_of_segformer_is_told_as_it_is() -> None:
    assert MODES["accurate"].commercial_use is False
    assert "non-commercial" in MODES["accurate"].licence
    assert MODES["demo"].commercial_use is True


def test_the_quality_of_the_demo_is_the_one_its_training_measured() -> None:
    metrics = json.loads((PACKAGE / MODES["demo"].source / "metrics.json").read_text())
    assert MODES["demo"].quality.miou == round(100 * metrics["miou"], 1)


def test_every_error_has_a_code_and_none_is_worth_a_retry() -> None:
    errors = (InvalidMedia, MediaLimit, ModelUnavailable, OutOfMemory)
    assert [error.code for error in errors] == ["invalid_media", "media_limit", "model_unavailable", "out_of_memory"]
    assert not any(error.retryable for error in errors)
    assert str(InvalidMedia("The image has no pixels")) == "The image has no pixels"
    assert all(issubclass(error, InferenceError) for error in errors)
