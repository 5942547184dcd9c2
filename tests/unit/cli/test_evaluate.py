"""`maskline evaluate` pairs files by name, scores them as the metrics do, and says what it could not compare."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from shared.inference.engine import Engine
from shared.inference.masks import encode_mask
from shared.inference.metrics import PROTOCOLS, Tally
from shared.inference.modes import MODES, Quality
from tests.unit.cli.conftest import Maskline
from tests.unit.cli.scenes import write_scenes

DEMO = ("evaluate", "--images", "images", "--labels", "labels", "--label-space", "demo", "--mode", "demo")
MADE = ("evaluate", "--masks", "masks", "--labels", "labels", "--json", "--label-space")


def write_maps(folder: Path, **maps: list[list[int]]) -> None:
    folder.mkdir()
    for name, ids in maps.items():
        (folder / f"{name}.png").write_bytes(encode_mask(np.array(ids, dtype=np.uint8)))


def figures(scored: dict[str, Any]) -> dict[str, float]:
    return {each["name"]: each["iou"] for each in scored["classes"] if each["iou"] is not None}


def test_the_demo_mode_on_unseen_scenes_scores_what_a_direct_computation_gives(
    maskline: Maskline, folder: Path
) -> None:
    scenes = write_scenes(folder, count=4)
    done = maskline(*DEMO, "--json")
    assert (done.status, done.err) == (0, "")
    scored = json.loads(done.out)
    assert scored["miou"] >= 0.85
    engine, tally = Engine(offline=True), Tally(PROTOCOLS["demo"])
    masks = {name: engine.segment(scene.image, "demo").mask for name, scene in scenes.items()}
    for name, scene in scenes.items():
        tally.add(truth=scene.labels, mask=masks[name])
    direct = tally.score()
    assert scored["miou"] == direct.miou
    assert scored["boundary_f"] == direct.boundary_f
    assert (scored["images"], scored["pixels"]) == (4, sum(scene.labels.size for scene in scenes.values()))
    sky = [(scene.labels == 1, masks[name] == 1) for name, scene in scenes.items()]
    union = sum(int((true | found).sum()) for true, found in sky)
    assert figures(scored)["sky"] == pytest.approx(sum(int((true & found).sum()) for true, found in sky) / union)
    assert scored["model"]["name"] == "Tiny Mask2Former on generated scenes"


def test_people_get_a_table(maskline: Maskline, folder: Path) -> None:
    write_maps(folder / "labels", a=[[1, 1, 2, 2]])
    write_maps(folder / "masks", a=[[1, 1, 1, 2]])
    done = maskline("evaluate", "--masks", "masks", "--labels", "labels", "--label-space", "demo")
    lines = [line.split() for line in done.out.splitlines()]
    assert lines[0] == ["id", "class", "IoU", "accuracy", "boundary", "F", "of", "the", "truth"]
    assert lines[1] == ["1", "sky", "66.67", "100.00", "100.00", "50.00"]
    assert lines[2] == ["2", "sun", "50.00", "50.00", "100.00", "50.00"]
    assert ["mIoU", "58.33", "%"] in lines
    assert ["mean", "accuracy", "75.00", "%"] in lines
    assert ["pixel", "accuracy", "75.00", "%"] in lines
    assert ["1", "images,", "4", "labeled", "pixels;", "masks", "in", "masks"] in lines
    assert "7 classes occur in neither truth nor masks, and count in no mean" in done.out


def test_beside_a_modes_score_stands_what_was_published_for_it(
    maskline: Maskline, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published = Quality("generated scenes", 12.5, "upside down")
    monkeypatch.setitem(MODES, "demo", replace(MODES["demo"], quality=published))
    write_scenes(folder, count=1)
    done = maskline(*DEMO, "--input-size", "64")
    assert done.status == 0
    assert done.out.endswith("\npublished: mIoU 12.5 % on generated scenes (upside down)\n")


def test_masks_that_are_made_already_are_scored_without_a_model(maskline: Maskline, folder: Path) -> None:
    write_maps(folder / "labels", a=[[0, 1, 2, 255]], b=[[15, 15]])
    write_maps(folder / "masks", a=[[0, 1, 1, 9]], b=[[15, 15]])
    scored = json.loads(maskline(*MADE, "voc").out)
    assert figures(scored) == {"background": 1, "aeroplane": 0.5, "bicycle": 0, "person": 1}
    assert (scored["pixels"], scored["model"]) == (5, None)


def test_what_segment_makes_scores_as_the_mode_does(maskline: Maskline, folder: Path) -> None:
    write_scenes(folder, count=2)
    maskline("segment", "images", "--mode", "demo", "--input-size", "128")
    made = json.loads(maskline(*MADE, "demo").out)
    run = json.loads(maskline(*DEMO, "--input-size", "128", "--json").out)
    assert made["classes"] == run["classes"]
    assert made["miou"] == run["miou"]


def test_a_score_says_how_its_masks_were_made(maskline: Maskline, folder: Path) -> None:
    write_scenes(folder, count=1)
    told = maskline(*DEMO, "--tta", "--input-size", "64").out
    assert "input_size 64, tta True\n" in told
    assert "input_size 384\n" in maskline(*DEMO).out
    recipe = json.loads(maskline(*DEMO, "--resize", "published", "--json").out)["recipe"]
    assert (recipe["resize"], recipe["input_size"], recipe["tta"]) == ("published", None, False)


def test_flipped_and_scaled_masks_score_otherwise_than_plain_ones(maskline: Maskline, folder: Path) -> None:
    write_scenes(folder, count=1)
    plain, averaged = (json.loads(maskline(*DEMO, "--json", *more).out) for more in ((), ("--tta",)))
    assert plain["classes"] != averaged["classes"]
    assert averaged["miou"] > 0.8


def test_a_palette_truth_is_read_by_its_indices(maskline: Maskline, folder: Path) -> None:
    write_maps(folder / "masks", a=[[0, 15]])
    (folder / "labels").mkdir()
    image = Image.fromarray(np.array([[0, 15]], dtype=np.uint8))
    image.putpalette([7] * 768)
    image.save(folder / "labels" / "a.png")
    assert figures(json.loads(maskline(*MADE, "voc").out)) == {"background": 1, "person": 1}


def test_what_has_no_partner_is_named(maskline: Maskline, folder: Path) -> None:
    write_maps(folder / "labels", a=[[1]], b=[[1]], only_truth=[[1]])
    write_maps(folder / "masks", a=[[1]], b=[[1]], **{f"extra{number:02}": [[1]] for number in range(12)})
    done = maskline(*MADE, "demo")
    assert done.status == 0
    told = done.err.splitlines()
    assert told[0].startswith("maskline: no label for extra00, extra01, ")
    assert told[0].endswith(", extra09 and 2 more")
    assert told[1] == "maskline: no mask for only_truth"
    scored = json.loads(done.out)
    assert scored["images"] == 2
    assert len(scored["without_label"]) == 12
    assert scored["without_source"] == ["only_truth"]


def test_a_list_says_which_names_count(maskline: Maskline, folder: Path) -> None:
    write_maps(folder / "labels", a=[[1]], b=[[2]], c=[[3]])
    write_maps(folder / "masks", a=[[1]], b=[[1]], c=[[3]])
    (folder / "val.txt").write_text("c  1\n\na -1\nd\n")
    done = maskline(*MADE, "demo", "--only", "val.txt")
    scored = json.loads(done.out)
    assert (scored["images"], scored["miou"]) == (2, 1)
    assert done.err.splitlines() == ["maskline: no label for d", "maskline: no mask for d"]


def test_a_limit_takes_the_first_by_name(maskline: Maskline, folder: Path) -> None:
    write_maps(folder / "labels", a=[[1]], b=[[2]], c=[[3]])
    write_maps(folder / "masks", a=[[1]], b=[[2]], c=[[1]])
    assert json.loads(maskline(*MADE, "demo").out)["miou"] < 1
    limited = json.loads(maskline(*MADE, "demo", "--limit", "2").out)
    assert (limited["images"], limited["miou"]) == (2, 1)


def test_what_cannot_be_compared_is_named_and_keeps_no_other_back(maskline: Maskline, folder: Path) -> None:
    write_maps(folder / "labels", a=[[1, 1]], b=[[1]], c=[[1]], d=[[200]], e=[[1]])
    write_maps(folder / "masks", a=[[1]], b=[[1]], c=[[77]], d=[[1]])
    Image.new("RGB", (1, 1)).save(folder / "masks" / "e.png")
    done = maskline(*MADE, "ade20k")
    assert done.status == 1
    assert done.err.splitlines() == [
        "maskline: labels/a.png: The truth has 2×1 pixels and the mask 1×1",
        "maskline: labels/d.png: The truth has pixels of id 200, which ade20k does not know",
        "maskline: masks/e.png: A label map holds 8-bit gray or palette indices, and this one colours of 8 bits",
    ]
    scored = json.loads(done.out)
    assert (scored["images"], scored["pixels"]) == (2, 2)
    assert [each["file"] for each in scored["failed"]] == ["labels/a.png", "labels/d.png", "masks/e.png"]


def test_a_truth_without_labels_has_no_score(maskline: Maskline, folder: Path) -> None:
    write_maps(folder / "labels", a=[[0, 0]])
    write_maps(folder / "masks", a=[[1, 1]])
    done = maskline(*MADE, "ade20k")
    assert (done.status, done.out) == (1, "")
    assert done.err == "maskline: nothing could be compared: The truth has no labeled pixel\n"


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (("--images", "masks", "--label-space", "ade20k", "--mode", "demo"), 2, "mode demo gives demo ids"),
        (("--images", "masks", "--label-space", "voc", "--mode", "sota"), 2, "mode sota gives ade20k ids"),
        (("--images", "masks", "--label-space", "coco", "--mode", "demo"), 2, "there is no label space coco"),
        (("--images", "masks", "--label-space", "demo", "--mode", "best"), 2, "there is no mode best"),
        (("--images", "masks", "--label-space", "demo"), 2, "say what to score"),
        (("--masks", "masks", "--label-space", "demo", "--mode", "demo"), 2, "--masks are scored as they are"),
        (("--masks", "masks", "--label-space", "demo", "--tta"), 2, "--masks are scored as they are"),
        (("--masks", "empty", "--label-space", "demo"), 2, "empty holds no .png"),
        (("--masks", "gone", "--label-space", "demo"), 2, "dir 'gone' does not exist"),
        (("--images", "twins", "--label-space", "demo", "--mode", "demo"), 2, "have one name"),
        (("--masks", "strangers", "--label-space", "demo"), 1, "no name in strangers is one in labels"),
    ],
)
def test_a_mistake_is_answered_in_one_line(
    maskline: Maskline, folder: Path, arguments: tuple[str, ...], status: int, says: str
) -> None:
    write_maps(folder / "labels", a=[[1]])
    write_maps(folder / "masks", a=[[1]])
    write_maps(folder / "strangers", z=[[1]])
    write_maps(folder / "twins", a=[[1]])
    (folder / "twins" / "a.jpg").write_bytes(b"light")
    (folder / "empty").mkdir()
    done = maskline("evaluate", "--labels", "labels", *arguments)
    assert (done.status, done.out) == (status, "")
    assert says in done.err
    assert done.err.count("\n") == 1
