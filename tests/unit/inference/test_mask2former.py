"""Mask2Former's forward pass gives what the library's gives, at every shape and for every kind of configuration."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Mask2FormerConfig

from shared.inference import deformable, mask_decoder, networks
from shared.inference.loading import load
from shared.inference.mask2former import PLANS_KEPT, SemanticMask2Former
from shared.inference.mask_decoder import visible_keys
from shared.inference.modes import MODES
from shared.inference.postprocess import QueryLogits

Pair = tuple[torch.Tensor, torch.Tensor]
CPU = torch.device("cpu")
SHAPES = [(1, 3, 64, 64), (1, 3, 144, 256), (2, 3, 96, 128), (1, 3, 50, 70), (3, 3, 160, 132)]


def build(window: int, seed: int = 0, **changes: Any) -> SemanticMask2Former:
    """A tiny network whose weights are large enough for every part to matter to the result."""
    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "backbone_config": {
            "model_type": "swin",
            "embed_dim": 16,
            "depths": [1, 2, 3, 1],
            "num_heads": [1, 2, 2, 4],
            "window_size": window,
            "out_features": ["stage1", "stage2", "stage3", "stage4"],
        },
        "feature_size": 64,
        "mask_feature_size": 32,
        "hidden_dim": 64,
        "encoder_feedforward_dim": 48,
        "encoder_layers": 2,
        "dim_feedforward": 32,
        "decoder_layers": 5,
        "num_attention_heads": 4,
        "num_queries": 20,
        "num_labels": 10,
    }
    network = SemanticMask2Former(Mask2FormerConfig(**settings | changes))
    for name, parameter in network.named_parameters():
        if "sampling_offsets.weight" in name or "attention_weights" in name or "bias_table" in name:
            torch.nn.init.normal_(parameter, std=0.5)
        elif "pixel_level_module.encoder" in name and parameter.dim() > 1:
            parameter.data *= 3
    networks.prepare(network, torch.float32)
    return network


def library_outputs(network: SemanticMask2Former, pixels: torch.Tensor) -> Pair:
    """The last masks and classes of the library's own modules, combined as its head does."""
    output = network.model(pixels, output_hidden_states=True)
    queries = output.transformer_decoder_intermediate_states[-1].transpose(0, 1)
    return output.masks_queries_logits[-1], network.class_predictor(queries)


def library_outputs_and_visible_keys(
    network: SemanticMask2Former, pixels: torch.Tensor
) -> tuple[Pair, list[torch.Tensor]]:
    """Also where every layer's queries look, (batch, queries, keys): the library's masks say where they do not."""
    layers = network.model.transformer_module.decoder.layers
    seen: list[torch.Tensor] = []

    def note(_layer: Any, _arguments: Any, named: dict[str, torch.Tensor]) -> None:
        hidden = named["encoder_attention_mask"]  # the same for each head
        seen.append(~hidden.view(len(pixels), -1, *hidden.shape[1:])[:, 0])

    hooks = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in layers]
    outputs = library_outputs(network, pixels)
    for hook in hooks:
        hook.remove()
    return outputs, seen


def relative_errors(found: Pair, expected: Pair) -> list[float]:
    assert [tensor.shape for tensor in found] == [tensor.shape for tensor in expected]
    return [float((own - other).abs().max() / other.abs().max()) for own, other in zip(found, expected, strict=True)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("window", "changes"),
    [
        (4, {}),
        (12, {}),
        (7, {"pre_norm": True}),
        (8, {"enforce_input_projection": True, "mask_feature_size": 64}),
    ],
)
def test_logits_equal_the_librarys(
    window: int, changes: dict[str, Any], shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given the same keys to look at: a mask logit within rounding of 0 may fall on either side, and then all differs.

    That ours are the library's but for such ties is asserted too.
    """
    network = build(window, **changes)
    pixels = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected, visible = library_outputs_and_visible_keys(network, pixels)
        ties, keys = 0, 0

        def compare(logits: torch.Tensor) -> torch.Tensor:
            nonlocal ties, keys
            theirs = visible.pop(0)
            ties += int((visible_keys(logits) != theirs).sum())
            keys += theirs.numel()
            return theirs

        monkeypatch.setattr(mask_decoder, "visible_keys", compare)
        errors = relative_errors(network(pixels), expected)
    assert max(errors) < 1e-4, errors
    assert ties <= keys / 10_000


def test_the_parameters_are_the_librarys() -> None:
    network = build(4)
    names = {name for name, _ in network.named_parameters()}
    with torch.inference_mode():
        network(torch.zeros((1, 3, 64, 64)))
    assert {name for name, _ in network.named_parameters()} == names
    assert {name.split(".")[0] for name in network.state_dict()} == {"model", "class_predictor"}


def test_a_query_that_sees_nothing_looks_everywhere() -> None:
    network = build(4)
    # All mask logits become negative, so the masks hide everything from every query.
    decoder = network.model.pixel_level_module.decoder
    decoder.mask_projection.weight.zero_()
    decoder.mask_projection.bias.fill_(-1)
    last = network.model.transformer_module.decoder.mask_predictor.mask_embedder.layers[-1].layers[0]
    last.weight.zero_()
    last.bias.fill_(1)
    pixels = torch.randn((1, 3, 64, 96))
    with torch.inference_mode():
        found = network(pixels)
        assert (found[0] < 0).all()
        errors = relative_errors(found, library_outputs(network, pixels))
    assert max(errors) < 1e-4, errors


def test_an_image_has_the_same_logits_alone_and_in_a_batch() -> None:
    network = build(7)
    pixels = torch.randn((3, 3, 96, 64))
    with torch.inference_mode():
        together = network(pixels)
        for number in range(3):
            alone = network(pixels[number : number + 1])
            found = (together[0][number : number + 1], together[1][number : number + 1])
            assert max(relative_errors(found, alone)) < 1e-4


def test_plans_of_the_last_few_shapes_are_kept_and_no_more() -> None:
    network = build(4)
    shapes = [torch.Size((1, 3, 64, 32 * number)) for number in range(1, PLANS_KEPT + 2)]
    plans = [network.plan(shape, CPU) for shape in shapes]
    assert network.plan(shapes[-1], CPU) is plans[-1]
    assert network.plan(shapes[1], CPU) is plans[1]
    assert network.plan(shapes[0], CPU) is not plans[0]


def test_the_demo_weights_give_the_librarys_logits() -> None:
    model = load(MODES["demo"], device=CPU)
    assert isinstance(model.network, SemanticMask2Former)
    pixels = torch.randn((1, 3, 192, 320), generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        errors = relative_errors(model.network(pixels), library_outputs(model.network, pixels))
    assert max(errors) < 1e-4, errors


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_near_single_and_samples_in_single(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = build(4)
    pixels = torch.randn((2, 3, 96, 128), generator=torch.Generator().manual_seed(3))
    seen = []
    sample_rows = deformable.sample_rows

    def watch(values: torch.Tensor, positions: torch.Tensor, weights: torch.Tensor, levels: Any) -> torch.Tensor:
        seen.extend([values.dtype, positions.dtype, weights.dtype])
        return sample_rows(values, positions, weights, levels)

    monkeypatch.setattr(deformable, "sample_rows", watch)
    with torch.inference_mode():
        whole = network(pixels)
        networks.prepare(network, dtype)
        half = network(pixels)
    assert set(seen) == {torch.float32}
    assert {tensor.dtype for tensor in half} == {torch.float32} or half[1].dtype == dtype
    for own, other in zip(half, whole, strict=True):
        assert float((own - other).abs().mean() / other.abs().mean()) < 0.05
    backbone = network.model.pixel_level_module.encoder.swin.encoder.layers[0].blocks[0]
    assert backbone.attention.q_proj.weight.dtype == dtype
    assert backbone.layernorm_before.weight.dtype == torch.float32
    assert {parameter.dtype for parameter in network.model.pixel_level_module.decoder.parameters()} == {torch.float32}


@pytest.mark.parametrize("sizes", [((3, 5), (6, 9), (12, 18)), ((1, 1), (2, 1), (4, 3))])
def test_both_ways_of_sampling_give_the_same_sum(sizes: tuple[tuple[int, int], ...]) -> None:
    """Also far outside the maps, on their borders and between their cells."""
    generator = torch.Generator().manual_seed(4)
    levels = deformable.plan_levels(sizes, CPU)
    count = sum(levels.counts)
    values = torch.randn((2, count, 4, 8), generator=generator)
    positions = torch.randn((2, 50, 4, 3, 2, 2), generator=generator) * 10
    positions[:, :10] = positions[:, :10].round()
    weights = torch.rand((2, 50, 4, 3, 2), generator=generator)
    rows = deformable.sample_rows(values, positions, weights, levels)
    grids = deformable.sample_grids(values, positions, weights, levels)
    torch.testing.assert_close(rows, grids, rtol=1e-4, atol=1e-4)


def test_predictions_come_one_for_each_image_of_a_batch() -> None:
    network = networks.prepare(build(4), torch.float32)
    with torch.inference_mode():
        predictions = networks.split(networks.run(network, torch.zeros((2, 3, 64, 96)), torch.float32))
    assert len(predictions) == 2
    for prediction in predictions:
        assert isinstance(prediction, QueryLogits)
        assert prediction.masks.shape == (20, 16, 24)
        assert prediction.classes.shape == (20, 11)


def test_a_published_checkpoint_is_read_in_half_precision(tiny_mask2former: Path) -> None:
    model = load(MODES["sota"], source=str(tiny_mask2former), device=CPU, dtype=torch.bfloat16)
    [output] = model.predict(torch.zeros((1, 3, 64, 64)))
    assert isinstance(output, QueryLogits)
    assert output.masks.dtype == torch.float32
    assert output.masks.isfinite().all()
