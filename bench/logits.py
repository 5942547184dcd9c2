"""Made-up model output for the benchmarks: what real images give, and noise.

Structured output has regions with sharp, wavy borders, a query each; the other queries claim "no object", half of
them shadowing a region and half lighting up somewhere. Random output is white noise, the worst case for shortcuts.
"""

import torch
from torch.nn import functional

from shared.inference.postprocess import PixelLogits, QueryLogits


def structured_queries(
    height: int, width: int, *, queries: int = 100, active: int = 20, channels: int = 150, seed: int = 0
) -> QueryLogits:
    """Masks (queries, height, width) of which `active` matter, and classes (queries, channels + 1)."""
    generator = torch.Generator().manual_seed(seed)
    regions = _regions(height, width, active, generator)
    owner = torch.cat([torch.arange(active), torch.randint(active, (queries - active,), generator=generator)])
    masks = torch.empty((queries, height, width))
    for query in range(queries):
        inside = (regions == owner[query]).float() if query < active or query % 2 else torch.zeros((height, width))
        level = 8 + 2 * torch.randn((), generator=generator)
        blurred = functional.avg_pool2d(inside[None, None], 3, stride=1, padding=1, count_include_pad=False)[0, 0]
        masks[query] = level * (2 * blurred - 1) + smooth_noise(height, width, 12, generator)
        masks[query] += 0.3 * torch.randn((height, width), generator=generator)
    classes = torch.randn((queries, channels + 1), generator=generator)
    # With 150 others around 0, these make about 90 % of the chance of one class, and 97 % of "no object".
    chosen = torch.randint(channels, (active,), generator=generator)
    classes[torch.arange(active), chosen] = 7.7 + torch.randn((active,), generator=generator)
    classes[active:, -1] = 9 + torch.randn((queries - active,), generator=generator)
    return QueryLogits(masks=masks, classes=classes)


def random_queries(height: int, width: int, *, queries: int = 100, channels: int = 150, seed: int = 0) -> QueryLogits:
    """White noise of the same shapes."""
    generator = torch.Generator().manual_seed(seed)
    return QueryLogits(
        masks=4 * torch.randn((queries, height, width), generator=generator),
        classes=2 * torch.randn((queries, channels + 1), generator=generator),
    )


def structured_pixels(height: int, width: int, *, channels: int, regions: int = 20, seed: int = 0) -> PixelLogits:
    """Logits (channels, height, width) where one class of each region stands out and the others vary smoothly."""
    generator = torch.Generator().manual_seed(seed)
    region = _regions(height, width, regions, generator)
    owner = torch.randint(channels, (regions,), generator=generator)[region]
    logits = torch.empty((channels, height, width))
    for channel in range(channels):
        inside = (owner == channel).float()
        blurred = functional.avg_pool2d(inside[None, None], 3, stride=1, padding=1, count_include_pad=False)[0, 0]
        logits[channel] = 8 * blurred + smooth_noise(height, width, 6, generator)
        logits[channel] += 0.3 * torch.randn((height, width), generator=generator)
    return PixelLogits(logits)


def random_pixels(height: int, width: int, *, channels: int, seed: int = 0) -> PixelLogits:
    """White noise of the same shape."""
    generator = torch.Generator().manual_seed(seed)
    return PixelLogits(4 * torch.randn((channels, height, width), generator=generator))


def _regions(height: int, width: int, count: int, generator: torch.Generator) -> torch.Tensor:
    """Which of `count` regions each place is in, int64: two parts each, with borders made wavy."""
    rows = torch.linspace(0, 1, height)[:, None] + 0.05 * smooth_noise(height, width, 16, generator)
    columns = torch.linspace(0, 1, width)[None, :] + 0.05 * smooth_noise(height, width, 16, generator)
    points = torch.rand((2 * count, 2), generator=generator)
    distances = (rows - points[:, 0, None, None]) ** 2 + (columns - points[:, 1, None, None]) ** 2
    return distances.argmin(dim=0) % count


def smooth_noise(height: int, width: int, knots: int, generator: torch.Generator) -> torch.Tensor:
    """Waves of standard height, float32 (height, width), about `knots` along a side."""
    coarse = torch.randn((1, 1, knots, knots), generator=generator)
    return functional.interpolate(coarse, size=(height, width), mode="bicubic", align_corners=False)[0, 0]
