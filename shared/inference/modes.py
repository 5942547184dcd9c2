"""The modes: one row per model that a job can choose. Adding a model is adding a row.

A row says where the weights come from and how their input and output are to be read; it holds no torch, so the API
serves it as it is. Published figures are quoted with their benchmark and are never our own measurements.
"""

from dataclasses import dataclass
from typing import Literal

from shared.inference.labels import LABEL_SPACES, LabelSpace

Architecture = Literal["deeplabv3_mobilenet_v3_large", "deeplabv3_resnet50", "segformer", "mask2former"]
Origin = Literal["torchvision", "hub", "packaged"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Quality:
    """A mean intersection over union in percent, as somebody published it, and what it was measured on."""

    benchmark: str
    miou: float
    note: str


@dataclass(frozen=True)
class PublishedInput:
    """How the published evaluation resized: aspect kept, the shorter side to `shorter` pixels, or less where the longer
    one would exceed `longer`. A side is its exact length plus `rounding`, cut to whole pixels, and then made a multiple
    of 32 by padding or by stretching, or not at all.
    """

    shorter: int
    longer: int | None
    align: Literal["no", "pad", "stretch"]
    rounding: float = 0.5


@dataclass(frozen=True)
class Mode:
    """One choosable model.

    `source` is read by `origin`: the name of a torchvision weights enumeration and its member, a repository on the
    Hugging Face hub, or a folder inside `shared/inference`. `channel_offset` is what turns an output channel into a
    class id: mask = channel + offset. `input_size` N is the side of the square that has as many pixels as the model's
    input. `mean` and `std` apply to RGB scaled to 0..1. `commercial_use` is None where the licence leaves it open.
    """

    name: str
    title: str
    architecture: Architecture
    origin: Origin
    source: str
    revision: str | None
    label_space: str
    channel_offset: int
    input_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    licence: str
    commercial_use: bool | None
    quality: Quality
    published: PublishedInput | None
    """None where the evaluation resized as every job does."""
    expected_memory_bytes: int | None
    """The device memory that the design this service started from expects on a T4: a claim, not a measurement."""
    help: str

    @property
    def labels(self) -> LabelSpace:
        return LABEL_SPACES[self.label_space]

    @property
    def channels(self) -> int:
        """How many classes the model itself tells apart."""
        return len(self.labels.classes) - self.channel_offset


_TORCHVISION_LICENCE = (
    "torchvision (BSD-3-Clause); its weights were trained on COCO, whose terms may add conditions of their own"
)

MODES = {
    mode.name: mode
    for mode in (
        Mode(
            name="fast",
            title="DeepLabV3-MobileNetV3-Large",
            architecture="deeplabv3_mobilenet_v3_large",
            origin="torchvision",
            source="DeepLabV3_MobileNet_V3_Large_Weights.COCO_WITH_VOC_LABELS_V1",
            revision=None,
            label_space="voc",
            channel_offset=0,
            input_size=512,
            mean=IMAGENET_MEAN,
            std=IMAGENET_STD,
            licence=_TORCHVISION_LICENCE,
            commercial_use=None,
            quality=Quality("COCO-val2017, 20 VOC classes + background", 60.3, "single scale, shorter side 520"),
            published=PublishedInput(shorter=520, longer=None, align="no", rounding=0),
            expected_memory_bytes=1_200_000_000,
            help="The quickest: people, animals, vehicles and a few household things, with coarse borders. "
            "For live previews and for machines without a GPU.",
        ),
        Mode(
            name="balanced",
            title="DeepLabV3-ResNet50",
            architecture="deeplabv3_resnet50",
            origin="torchvision",
            source="DeepLabV3_ResNet50_Weights.COCO_WITH_VOC_LABELS_V1",
            revision=None,
            label_space="voc",
            channel_offset=0,
            input_size=512,
            mean=IMAGENET_MEAN,
            std=IMAGENET_STD,
            licence=_TORCHVISION_LICENCE,
            commercial_use=None,
            quality=Quality("COCO-val2017, 20 VOC classes + background", 66.4, "single scale, shorter side 520"),
            published=PublishedInput(shorter=520, longer=None, align="no", rounding=0),
            expected_memory_bytes=2_500_000_000,
            help="The same 20 classes as `fast`, found more reliably, at about ten times the arithmetic. "
            "A sound default where these classes are enough.",
        ),
        Mode(
            name="accurate",
            title="SegFormer-B3",
            architecture="segformer",
            origin="hub",
            source="nvidia/segformer-b3-finetuned-ade-512-512",
            revision="main",
            label_space="ade20k",
            channel_offset=1,
            input_size=512,
            mean=IMAGENET_MEAN,
            std=IMAGENET_STD,
            licence="NVIDIA Source Code License for SegFormer: non-commercial use only",
            commercial_use=False,
            quality=Quality("ADE20K val", 49.4, "single scale; 50.0 multi-scale and flipped"),
            published=PublishedInput(shorter=512, longer=2048, align="stretch"),
            expected_memory_bytes=4_500_000_000,
            help="Labels every pixel with one of 150 indoor and outdoor classes, at moderate cost. "
            "For scene understanding where `sota` is too slow.",
        ),
        Mode(
            name="sota",
            title="Mask2Former-Swin-Large",
            architecture="mask2former",
            origin="hub",
            source="facebook/mask2former-swin-large-ade-semantic",
            revision="main",
            label_space="ade20k",
            channel_offset=1,
            input_size=1024,
            mean=IMAGENET_MEAN,
            std=IMAGENET_STD,
            licence='The code is MIT; the model card says "other", and the training images are for research',
            commercial_use=None,
            quality=Quality("ADE20K val", 56.1, "single scale, shorter side 640; 57.3 multi-scale and flipped"),
            published=PublishedInput(shorter=640, longer=2560, align="pad"),
            expected_memory_bytes=6_500_000_000,
            help="The best masks: 150 classes, small objects, precise borders. For recording and archiving results, "
            "where quality counts more than the seconds it takes.",
        ),
        Mode(
            name="demo",
            title="Tiny Mask2Former on generated scenes",
            architecture="mask2former",
            origin="packaged",
            source="demo/weights",
            revision=None,
            label_space="demo",
            channel_offset=1,
            input_size=384,
            mean=IMAGENET_MEAN,
            std=IMAGENET_STD,
            licence="Apache-2.0, as the rest of Maskline",
            commercial_use=True,
            quality=Quality("generated scenes that were not trained on", 91.8, "measured by the training script"),
            published=None,
            expected_memory_bytes=None,
            help="Knows nine classes of drawn landscapes and nothing of photographs. It ships with Maskline, so the "
            "whole service runs on a machine that has neither a GPU nor a network.",
        ),
    )
}
