"""A library's own way from an image to its labels, stage by stage: what somebody without Maskline would write.

transformers with its image processors for `accurate` and `sota`, torchvision for `fast` and `balanced`. The input has
the size that it is told; on CUDA the network runs under autocast to half precision.
"""

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional
from torchvision.transforms.v2 import functional as transforms
from transformers.models.mask2former.image_processing_mask2former import Mask2FormerImageProcessor
from transformers.models.segformer.image_processing_segformer import SegformerImageProcessor

from bench._networks import build_library, forward_of
from shared.inference.modes import MODES
from shared.inference.postprocess import PixelLogits, QueryLogits

Size = tuple[int, int]
Output = tuple[torch.Tensor, ...]


class Library:
    """The library's network of a mode over the weights of `network`, and what belongs before and after it."""

    def __init__(self, mode: str, network: Any, device: torch.device) -> None:
        self._mode = MODES[mode]
        self._network = build_library(mode, network).to(device)
        self._device = device
        kinds: dict[str, Any] = {"sota": Mask2FormerImageProcessor, "accurate": SegformerImageProcessor}
        self._processor = kinds[mode]() if mode in kinds else None

    def own_input_size(self, size: Size) -> Size:
        """The (width, height) to which the library resizes a source when it is left to itself.

        torchvision's transforms of these weights and the image processor published with Mask2Former keep the aspect;
        that of SegFormer makes a square.
        """
        published = self._mode.published
        if published is None or self._mode.name == "accurate":
            return (512, 512)
        scale = published.shorter / min(size)
        if published.longer is not None:
            scale = min(scale, published.longer / max(size))
        return round(size[0] * scale), round(size[1] * scale)

    def preprocess(self, image: NDArray[np.uint8], input_size: Size) -> torch.Tensor:
        """uint8 RGB (height, width, 3) to float32 (1, 3, h, w) of `input_size` (width, height)."""
        width, height = input_size
        if self._processor is not None:
            inputs = self._processor(images=image, size={"height": height, "width": width}, return_tensors="pt")
            pixels: torch.Tensor = inputs["pixel_values"].to(self._device)
            return pixels
        planes = torch.from_numpy(image).to(self._device).permute(2, 0, 1)[None]
        planes = transforms.resize(planes, [height, width], antialias=True)
        normalised: torch.Tensor = transforms.normalize(planes.float() / 255, self._mode.mean, self._mode.std)
        return normalised

    def forward(self, pixels: torch.Tensor) -> Output:
        """Masks and classes of queries, or logits of channels, which torchvision upsamples to the input's size."""
        with torch.autocast(pixels.device.type, torch.float16, enabled=pixels.device.type == "cuda"):
            return forward_of(self._network)(pixels)

    def label(self, output: Output, size: Size) -> torch.Tensor:
        """The winning channels, int64 (height, width), of a source of `size` (width, height)."""
        if self._processor is None:
            planes = functional.interpolate(output[0].float(), size=size[::-1], mode="bilinear", align_corners=False)
            return planes[0].argmax(dim=0).cpu()
        names = ("logits",) if len(output) == 1 else ("masks_queries_logits", "class_queries_logits")
        outputs = SimpleNamespace(**dict(zip(names, output, strict=True)))
        [labels] = self._processor.post_process_semantic_segmentation(outputs, target_sizes=[size[::-1]])
        assert isinstance(labels, torch.Tensor)
        return labels.cpu()

    def logits(self, pixels: torch.Tensor, output: Output) -> PixelLogits | QueryLogits:
        """What `forward` gave as the core's own types; of DeepLabV3 once more, without its upsampling."""
        if len(output) == 2:
            return QueryLogits(masks=output[0][0], classes=output[1][0])
        if self._processor is not None:
            return PixelLogits(output[0][0])
        return PixelLogits(self._network.classifier(self._network.backbone(pixels)["out"])[0])
