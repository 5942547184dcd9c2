"""The model's input: its size for every aspect, and its values."""

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torchvision.transforms import functional as reference

from shared.inference.modes import IMAGENET_MEAN, IMAGENET_STD
from shared.inference.resize import MAX_ASPECT, STRIDE, fit_size, to_input


@pytest.mark.parametrize(
    ("width", "height", "input_size", "expected"),
    [
        (1024, 1024, 1024, (1024, 1024)),
        (1, 1, 1024, (1024, 1024)),
        (1920, 1080, 1024, (1376, 768)),
        (1080, 1920, 1024, (768, 1376)),
        (640, 480, 512, (576, 448)),
        (5, 5, 32, (32, 32)),
    ],
)
def test_the_sizes_that_the_design_names(width: int, height: int, input_size: int, expected: tuple[int, int]) -> None:
    assert fit_size(width, height, input_size) == expected


@given(st.integers(1, 100_000), st.integers(1, 100_000), st.sampled_from([128, 256, 384, 512, 768, 1024, 1280, 2048]))
@example(20_000, 1, 1024)
@example(1, 20_000, 512)
def test_every_aspect_costs_about_the_same(width: int, height: int, input_size: int) -> None:
    fitted_width, fitted_height = fit_size(width, height, input_size)
    assert fitted_width % STRIDE == 0
    assert fitted_height % STRIDE == 0
    assert min(fitted_width, fitted_height) >= STRIDE
    # Rounding moves a side by half a stride at most, except where the floor of one stride holds it up.
    ideal = min(width / height, height / width, 1.0)
    short = input_size * max(ideal, 1 / MAX_ASPECT) ** 0.5
    slack = (1 + STRIDE / 2 / short) * (1 + STRIDE / 2 / input_size) * max(1.0, STRIDE / short)
    assert input_size**2 / slack / 1.5 <= fitted_width * fitted_height <= input_size**2 * slack


@given(st.integers(1, 100_000), st.integers(1, 100_000), st.sampled_from([512, 1024]))
def test_the_aspect_is_kept_up_to_rounding(width: int, height: int, input_size: int) -> None:
    fitted_width, fitted_height = fit_size(width, height, input_size)
    aspect = min(max(width / height, 1 / MAX_ASPECT), MAX_ASPECT)
    assert abs(fitted_width - input_size * aspect**0.5) <= STRIDE / 2 + 1e-6
    assert abs(fitted_height - input_size / aspect**0.5) <= STRIDE / 2 + 1e-6


@given(st.integers(1, 10_000), st.integers(1, 10_000))
def test_turning_the_image_turns_the_input(width: int, height: int) -> None:
    assert fit_size(width, height, 512) == fit_size(height, width, 512)[::-1]


@pytest.mark.parametrize(("width", "height", "input_size"), [(0, 5, 512), (5, 0, 512), (5, 5, 31), (5, 5, 0)])
def test_sizes_that_cannot_be_are_refused(width: int, height: int, input_size: int) -> None:
    with pytest.raises(ValueError, match=r"pixels|input_size"):
        fit_size(width, height, input_size)


@pytest.mark.parametrize("size", [(64, 32), (256, 192), (96, 128)])
def test_the_input_is_what_torchvision_makes_of_the_image(photo: NDArray[np.uint8], size: tuple[int, int]) -> None:
    got = to_input(photo, size=size, mean=IMAGENET_MEAN, std=IMAGENET_STD, device=torch.device("cpu"))
    planes = torch.from_numpy(photo).permute(2, 0, 1)[None].float() / 255
    planes = reference.resize(planes, [size[1], size[0]], antialias=True)
    expected = reference.normalize(planes, list(IMAGENET_MEAN), list(IMAGENET_STD))
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
