"""Label spaces: what is told about them beside masks."""

import numpy as np
import pytest

from shared.inference.labels import LABEL_SPACES, LabelSpace, describe_classes
from shared.inference.masks import colour


@pytest.mark.parametrize("label_space", LABEL_SPACES.values(), ids=LABEL_SPACES)
def test_every_class_is_told_with_the_colour_that_overlays_have(label_space: LabelSpace) -> None:
    told = describe_classes(label_space)
    assert told["label_space"] == label_space.name
    assert [each["id"] for each in told["classes"]] == list(range(len(label_space.classes)))
    assert [each["name"] for each in told["classes"]] == list(label_space.classes)
    ids = np.arange(len(label_space.classes), dtype=np.uint8)[None]
    assert [each["color"] for each in told["classes"]] == [
        f"#{bytes(rgb).hex()}" for rgb in colour(ids, label_space)[0]
    ]
