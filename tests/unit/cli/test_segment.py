"""`maskline segment` makes the engine's masks, one file each, and neither loses nor replaces any."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shared.inference.engine import Engine
from shared.inference.labels import DEMO
from shared.inference.masks import decode_mask
from shared.inference.recipe import Recipe
from tests.unit.cli.conftest import Maskline
from tests.unit.cli.scenes import write_scenes


def test_a_folder_of_images_becomes_a_folder_of_the_engines_masks(maskline: Maskline, folder: Path) -> None:
    scenes = write_scenes(folder, count=2)
    done = maskline("segment", "images", "--mode", "demo", "--out", "made/here", "--input-size", "128")
    assert (done.status, done.err) == (0, "")
    assert done.out.splitlines() == ["made/here/a.png", "made/here/b.png"]
    engine = Engine(offline=True)
    for name, scene in scenes.items():
        mask = decode_mask((folder / "made" / "here" / f"{name}.png").read_bytes())
        assert np.array_equal(mask, engine.segment(scene.image, "demo", Recipe(input_size=128)).mask)


def test_json_is_one_object_per_image_with_what_made_its_mask(maskline: Maskline, folder: Path) -> None:
    scenes = write_scenes(folder, count=1)
    done = maskline("segment", "images/a.png", "-m", "demo", "--overlay", "--json")
    made = json.loads(done.out)
    assert (made["file"], made["mask"], made["overlay"]) == ("images/a.png", "masks/a.png", "masks/a.overlay.png")
    assert (made["width"], made["height"]) == (320, 240)
    assert sum(made["classes"].values()) == scenes["a"].labels.size
    assert set(made["classes"]) <= set(DEMO.classes)
    assert made["model"]["label_space"] == "demo"
    assert made["seconds"]["inference"] > 0
    with Image.open(folder / "masks" / "a.overlay.png") as picture:
        assert (picture.mode, picture.size) == ("RGB", (320, 240))


@pytest.mark.parametrize(
    ("options", "recipe"),
    [
        (("--tta", "--input-size", "64"), Recipe(tta=True, input_size=64)),
        (
            ("--tiles", "--input-size", "160", "--tile-overlap", "0.5"),
            Recipe(tiles=True, input_size=160, tile_overlap=0.5),
        ),
        (("--resize", "published"), Recipe(resize="published")),
        (("--unlabeled-below", "0.9"), Recipe(unlabeled_below=0.9)),
    ],
)
def test_every_option_of_a_job_makes_the_mask_that_a_job_would_get(
    maskline: Maskline, folder: Path, options: tuple[str, ...], recipe: Recipe
) -> None:
    scene = write_scenes(folder, count=1)["a"]
    made = json.loads(maskline("segment", "images", "-m", "demo", "--json", *options).out)
    wanted = Engine(offline=True).segment(scene.image, "demo", recipe)
    assert np.array_equal(decode_mask((folder / "masks" / "a.png").read_bytes()), wanted.mask)
    assert (made["model"]["passes"], made["warnings"]) == (wanted.model.passes, [])


def test_how_sure_each_pixel_is_lies_beside_the_mask(maskline: Maskline, folder: Path) -> None:
    scene = write_scenes(folder, count=1)["a"]
    made = json.loads(maskline("segment", "images", "-m", "demo", "--confidence", "--json").out)
    assert made["confidence"] == "masks/a.confidence.png"
    sure = decode_mask((folder / "masks" / "a.confidence.png").read_bytes())
    wanted = Engine(offline=True).segment(scene.image, "demo", Recipe(confidence=True)).confidence
    assert wanted is not None
    assert np.array_equal(sure, wanted)


def test_on_a_terminal_a_bar_shows_the_image_in_hand_and_the_output_stays_as_it_is(
    maskline: Maskline, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes this for a terminal
    write_scenes(folder, count=1)
    done = maskline("segment", "images", "-m", "demo", "--input-size", "64")
    assert done.out == "masks/a.png\n"
    assert "0/1" in done.err
    assert "a.png" in done.err


def test_bad_files_are_named_and_keep_no_other_back(maskline: Maskline, folder: Path) -> None:
    write_scenes(folder, count=2)
    (folder / "images" / "a.png").write_bytes((folder / "images" / "a.png").read_bytes()[:3000])
    (folder / "images" / "notes.jpg").write_text("no picture")
    done = maskline("segment", "images", "-m", "demo", "--input-size", "64")
    assert done.status == 1
    assert done.out == "masks/b.png\n"
    first, second = done.err.splitlines()
    assert first == "maskline: images/a.png: The image is damaged or cut short and cannot be decoded"
    assert second.startswith("maskline: images/notes.jpg: The file is no image of a known format")
    assert [path.name for path in (folder / "masks").iterdir()] == ["b.png"]


def test_as_json_a_bad_file_is_an_object_too(maskline: Maskline, folder: Path) -> None:
    (folder / "notes.jpg").write_text("no picture")
    done = maskline("segment", "notes.jpg", "-m", "demo", "--json")
    assert done.status == 1
    assert json.loads(done.out)["error"]["code"] == "invalid_media"


def test_a_mask_that_is_there_is_replaced_only_by_force(maskline: Maskline, folder: Path) -> None:
    write_scenes(folder, count=2)
    (folder / "masks").mkdir()
    (folder / "masks" / "b.png").write_text("precious")
    done = maskline("segment", "images", "-m", "demo", "--input-size", "64")
    assert done.status == 1
    assert done.err == "maskline: masks/b.png would be replaced: say --force, or choose another --out\n"
    assert [path.name for path in (folder / "masks").iterdir()] == ["b.png"]
    assert (folder / "masks" / "b.png").read_text() == "precious"
    assert maskline("segment", "images", "-m", "demo", "--input-size", "64", "--force").status == 0
    assert decode_mask((folder / "masks" / "b.png").read_bytes()).shape == (225, 400)


def test_no_force_lets_a_mask_replace_an_image(maskline: Maskline, folder: Path) -> None:
    write_scenes(folder, count=1)
    before = (folder / "images" / "a.png").read_bytes()
    done = maskline("segment", "images", "-m", "demo", "--out", "images", "--force")
    assert done.status == 2
    assert done.err == "maskline: images/a.png is one of the images itself: choose another --out\n"
    assert (folder / "images" / "a.png").read_bytes() == before


def test_images_of_one_name_do_not_take_each_others_place(maskline: Maskline, folder: Path) -> None:
    write_scenes(folder, count=1)
    shutil.copytree(folder / "images", folder / "others")
    done = maskline("segment", "images", "others/a.png", "images/a.png", "-m", "demo", "--input-size", "64")
    assert done.out.splitlines() == ["masks/a.png", "masks/a-2.png"]


def test_a_folder_is_searched_for_images_alone_and_not_below(maskline: Maskline, folder: Path) -> None:
    write_scenes(folder, count=1)
    (folder / "images" / "deeper").mkdir()
    for name in ("notes.txt", ".hidden.png", "deeper/c.png"):
        (folder / "images" / name).write_bytes(b"none")
    done = maskline("segment", "images", "-m", "demo", "--input-size", "64")
    assert (done.status, done.out) == (0, "masks/a.png\n")


def test_weights_that_cannot_be_had_end_it_at_once_and_say_where_to_get_them(
    maskline: Maskline, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MASKLINE_MODELS__CACHE_FOLDER", str(folder / "cache"))
    monkeypatch.setenv("MASKLINE_MODELS__OFFLINE", "true")
    write_scenes(folder, count=2)
    done = maskline("segment", "images", "-m", "sota")
    assert done.status == 1
    assert "maskline models pull sota" in done.err
    assert done.err.count("\n") == 1
    assert not (folder / "masks").exists()


def test_a_device_that_is_not_there_is_named(maskline: Maskline, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASKLINE_WORKER__DEVICE", "abacus")
    write_scenes(folder, count=1)
    done = maskline("segment", "images", "-m", "demo")
    assert done.status == 1
    assert done.err.startswith(
        "maskline: MASKLINE_WORKER__… does not fit this machine: there is no device called 'abacus'"
    )
    assert done.err.count("\n") == 1


def test_a_folder_that_cannot_be_written_is_told_in_one_line(maskline: Maskline, folder: Path) -> None:
    write_scenes(folder, count=1)
    (folder / "blocked").write_text("")
    done = maskline("segment", "images", "-m", "demo", "--out", "blocked/below", "--input-size", "64")
    assert done.status == 1
    assert done.err == "maskline: blocked/below/a.png cannot be written: Not a directory\n"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("empty", "-m", "demo"), "empty holds no .jpg"),
        (("missing.jpg", "-m", "demo"), "missing.jpg' does not exist"),
        (("photo.jpg", "-m", "best"), "there is no mode best; the modes are fast, balanced"),
        (("photo.jpg", "-m", "demo", "--input-size", "8"), "Invalid value for '--input-size'"),
        (("photo.jpg", "-m", "demo", "--resize", "half"), "Invalid value for '--resize'"),
        (("photo.jpg", "-m", "demo", "--resize", "published", "--tiles"), 'leave resize "published" out'),
    ],
)
def test_a_mistake_is_answered_in_one_line(
    maskline: Maskline, folder: Path, arguments: tuple[str, ...], says: str
) -> None:
    (folder / "empty").mkdir()
    (folder / "photo.jpg").write_bytes(b"light")
    done = maskline("segment", *arguments)
    assert (done.status, done.out) == (2, "")
    assert says in done.err
    assert done.err.count("\n") == 1
