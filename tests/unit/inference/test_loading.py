"""From files to a network: the real formats are read, and nothing that is wrong with them gets through."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from transformers.models.mask2former import modeling_mask2former

from shared.inference import networks
from shared.inference.errors import ModelUnavailable
from shared.inference.loading import load
from shared.inference.modes import MODES
from shared.inference.postprocess import PixelLogits, QueryLogits
from tests.unit.inference.conftest import Sources

CPU = torch.device("cpu")
NETWORK_MODES = ["fast", "balanced", "accurate", "sota"]


@pytest.fixture
def folder_of(sources: Sources, tmp_path: Path) -> Callable[[str], Path]:
    """A copy of a mode's checkpoint to spoil."""

    def copy(mode: str) -> Path:
        return Path(shutil.copytree(sources[mode][0], tmp_path / mode))

    return copy


def assert_unavailable(mode: str, folder: Path, words: str) -> None:
    with pytest.raises(ModelUnavailable, match=words) as raised:
        load(MODES[mode], source=str(folder), device=CPU)
    assert str(folder) in str(raised.value)
    assert f"MASKLINE_MODELS__{mode.upper()}__SOURCE" in str(raised.value)


@pytest.mark.parametrize("mode", NETWORK_MODES)
def test_a_checkpoint_gives_raw_output_of_its_classes(mode: str, sources: Sources) -> None:
    model = load(MODES[mode], source=sources[mode][0], device=CPU)
    [output] = model.predict(torch.zeros((1, 3, 64, 96)))
    if isinstance(output, QueryLogits):
        assert output.masks.shape == (20, 16, 24)
        assert output.classes.shape == (20, 151)
    else:
        assert output.logits.shape[0] == MODES[mode].channels
        assert output.logits.shape[1] < 64, "not upsampled yet"
    assert not any(parameter.requires_grad for parameter in model.network.parameters())
    assert not model.network.training
    assert model.revision.startswith("sha256:")


def test_our_mask2former_answers_as_the_librarys_own(sources: Sources, monkeypatch: pytest.MonkeyPatch) -> None:
    # The library's class refuses to exist without scipy, which only its training loss uses.
    monkeypatch.setattr(modeling_mask2former, "requires_backends", lambda *_: None)
    kind = modeling_mask2former.Mask2FormerForUniversalSegmentation
    reference = kind.from_pretrained(sources["sota"][0], local_files_only=True).eval()  # type: ignore[no-untyped-call]
    pixels = torch.rand((1, 3, 96, 64), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = reference(pixels)
    [output] = load(MODES["sota"], source=sources["sota"][0], device=CPU).predict(pixels)
    assert isinstance(output, QueryLogits)
    torch.testing.assert_close(output.masks, expected.masks_queries_logits[0])
    torch.testing.assert_close(output.classes, expected.class_queries_logits[0])


@pytest.mark.parametrize("mode", ["fast", "balanced"])
def test_our_deeplab_answers_as_torchvisions_own_before_upsampling(mode: str, sources: Sources) -> None:
    model = load(MODES[mode], source=sources[mode][0], device=CPU)
    pixels = torch.rand((1, 3, 64, 96), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = model.network(pixels)["out"][0]
    [output] = model.predict(pixels)
    assert isinstance(output, PixelLogits)
    upsampled = torch.nn.functional.interpolate(output.logits[None], size=(64, 96), mode="bilinear")[0]
    torch.testing.assert_close(upsampled, expected)


@pytest.mark.parametrize("mode", NETWORK_MODES)
def test_every_tensor_comes_from_the_file(
    mode: str, folder_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All weights are set to one value in the file; any tensor that differs afterwards was made up."""
    # Preparing folds some tensors into others; here it is about what was read.
    monkeypatch.setattr(networks, "prepare", lambda network, _: network)
    folder = folder_of(mode)
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    for tensor in tensors.values():
        if tensor.is_floating_point():
            tensor.fill_(0.125)
    safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    network = load(MODES[mode], source=str(folder), device=CPU).network
    for name, parameter in network.named_parameters():
        assert torch.all(parameter == 0.125), name


def test_the_checkpoint_has_the_names_that_the_hub_has(sources: Sources) -> None:
    # transformers renames Swin's tensors while reading; a fixture in the new names would not prove that it does.
    with safetensors.safe_open(Path(sources["sota"][0]) / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert "model.pixel_level_module.encoder.encoder.layers.0.blocks.0.attention.self.query.weight" in names
    assert "model.transformer_module.decoder.layers.0.cross_attn.in_proj_weight" in names


def test_what_a_published_checkpoint_holds_for_training_is_ignored(folder_of: Callable[[str], Path]) -> None:
    folder = folder_of("sota")
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    tensors["criterion.empty_weight"] = torch.ones(151)
    safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    load(MODES["sota"], source=str(folder), device=CPU)


def test_half_precision_weights_are_computed_in_single(folder_of: Callable[[str], Path]) -> None:
    for mode in ("fast", "accurate"):
        folder = folder_of(mode)
        tensors = safetensors.torch.load_file(folder / "model.safetensors")
        halves = {name: value.half() if value.is_floating_point() else value for name, value in tensors.items()}
        safetensors.torch.save_file(halves, folder / "model.safetensors", metadata={"format": "pt"})
        network = load(MODES[mode], source=str(folder), device=CPU).network
        assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}


def test_half_precision_leaves_the_pixel_decoder_in_single(sources: Sources) -> None:
    model = load(MODES["sota"], source=sources["sota"][0], device=CPU, dtype=torch.bfloat16)
    dtypes = {name: parameter.dtype for name, parameter in model.network.named_parameters()}
    assert {dtype for name, dtype in dtypes.items() if "pixel_level_module.decoder" in name} == {torch.float32}
    assert torch.bfloat16 in dtypes.values()
    [output] = model.predict(torch.zeros((1, 3, 64, 64)))
    assert isinstance(output, QueryLogits)
    assert output.masks.dtype == torch.float32


def test_a_deeplab_pth_with_nothing_but_tensors_is_read(sources: Sources, tmp_path: Path) -> None:
    tensors = safetensors.torch.load_file(Path(sources["fast"][0]) / "model.safetensors")
    torch.save(tensors, tmp_path / "deeplab.pth")
    read = load(MODES["fast"], source=str(tmp_path), device=CPU)
    safe = load(MODES["fast"], source=sources["fast"][0], device=CPU)
    pixels = torch.ones((1, 3, 64, 64))
    [first], [second] = read.predict(pixels), safe.predict(pixels)
    assert isinstance(first, PixelLogits)
    assert isinstance(second, PixelLogits)
    assert torch.equal(first.logits, second.logits)


class Bomb:
    """Unpickled without restrictions, this makes a folder where it is told to."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.canary),)


@pytest.mark.parametrize(
    ("mode", "name"), [("fast", "model.pth"), ("accurate", "pytorch_model.bin"), ("sota", "pytorch_model.bin")]
)
@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_with_code_in_it_is_refused_and_never_run(
    mode: str, name: str, zipped: bool, folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    folder, canary = folder_of(mode), tmp_path / "canary"
    (folder / "model.safetensors").unlink()
    bomb = {"classifier.4.weight": Bomb(canary), "x": torch.zeros(1)}
    if zipped:
        torch.save(bomb, folder / name)
    else:
        (folder / name).write_bytes(pickle.dumps(bomb))
    assert_unavailable(mode, folder, "cannot be read")
    assert not canary.exists()


def test_the_bomb_of_these_tests_would_go_off(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Bomb(tmp_path / "canary")))  # noqa: S301
    assert (tmp_path / "canary").is_dir()


@pytest.mark.parametrize("mode", NETWORK_MODES)
@pytest.mark.parametrize("kept", [0.0, 0.0001, 0.5, 0.999])
def test_weights_cut_short_are_refused(mode: str, kept: float, folder_of: Callable[[str], Path]) -> None:
    folder = folder_of(mode)
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: int(len(data) * kept)])
    assert_unavailable(mode, folder, "cannot be read")


@pytest.mark.parametrize(
    ("mode", "lost"),
    [
        ("fast", "classifier.0.convs.1.0.weight"),
        ("balanced", "backbone.layer4.2.bn3.running_var"),
        ("accurate", "decode_head.batch_norm.running_mean"),
        ("sota", "class_predictor.weight"),
        ("sota", "model.pixel_level_module.encoder.encoder.layers.2.blocks.0.attention.self.key.bias"),
    ],
)
def test_a_missing_tensor_is_named_and_never_made_up(mode: str, lost: str, folder_of: Callable[[str], Path]) -> None:
    folder = folder_of(mode)
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    del tensors[lost]
    safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert_unavailable(mode, folder, "lacks 1 tensors")


@pytest.mark.parametrize(
    ("mode", "name"),
    [("fast", "classifier.1.weight"), ("accurate", "decode_head.classifier.bias"), ("sota", "class_predictor.bias")],
)
def test_a_tensor_of_another_shape_is_refused(mode: str, name: str, folder_of: Callable[[str], Path]) -> None:
    folder = folder_of(mode)
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    tensors[name] = torch.zeros(tensors[name].shape[0] + 1, *tensors[name].shape[1:])
    safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelUnavailable):
        load(MODES[mode], source=str(folder), device=CPU)


@pytest.mark.parametrize(("mode", "other"), [("accurate", "sota"), ("sota", "accurate")])
def test_another_architecture_is_named(mode: str, other: str, sources: Sources) -> None:
    assert_unavailable(mode, Path(sources[other][0]), f"holds a {MODES[other].architecture} model")


@pytest.mark.parametrize(("mode", "other"), [("fast", "balanced"), ("balanced", "fast"), ("fast", "accurate")])
def test_the_weights_of_another_network_are_refused(mode: str, other: str, sources: Sources) -> None:
    assert_unavailable(mode, Path(sources[other][0]), r"tensors of|no DeepLabV3")


def test_another_number_of_classes_is_refused(folder_of: Callable[[str], Path]) -> None:
    folder = folder_of("fast")
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    tensors["classifier.4.weight"] = tensors["classifier.4.weight"][:19].contiguous()
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    assert_unavailable("fast", folder, "19 classes")


def test_the_demo_model_does_not_pass_for_ade20k() -> None:
    demo = Path(networks.__file__).parent / MODES["demo"].source
    assert_unavailable("sota", demo, "9 classes")


def test_a_folder_without_a_configuration_is_refused(folder_of: Callable[[str], Path]) -> None:
    folder = folder_of("sota")
    (folder / "config.json").unlink()
    assert_unavailable("sota", folder, r"no config\.json")


def test_a_configuration_that_is_no_json_is_refused(folder_of: Callable[[str], Path]) -> None:
    folder = folder_of("accurate")
    (folder / "config.json").write_text("{")
    assert_unavailable("accurate", folder, "cannot be read")


def test_code_in_a_checkpoint_folder_is_never_imported(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    folder, canary = folder_of("accurate"), tmp_path / "canary"
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForSemanticSegmentation": "evil.Model"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"import os; os.mkdir({str(canary)!r})\n")
    load(MODES["accurate"], source=str(folder), device=CPU)
    assert not canary.exists()
