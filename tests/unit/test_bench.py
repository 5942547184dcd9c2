"""The benchmark of the core says what it promises to say; how long anything takes is not a test."""

import json

import pytest
import torch

from bench import _networks, core

TINY = {
    "num_labels": 150,
    "backbone_config": {
        "model_type": "swin",
        "embed_dim": 8,
        "depths": [1, 1, 1, 1],
        "num_heads": [1, 1, 2, 2],
        "window_size": 4,
        "out_features": ["stage1", "stage2", "stage3", "stage4"],
    },
    "feature_size": 32,
    "mask_feature_size": 32,
    "hidden_dim": 32,
    "encoder_feedforward_dim": 32,
    "encoder_layers": 1,
    "dim_feedforward": 32,
    "decoder_layers": 3,
    "num_attention_heads": 2,
    "num_queries": 20,
}


def test_the_last_line_has_every_figure(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(_networks, "MASK2FORMER_SWIN_LARGE", TINY)
    monkeypatch.setattr(core, "REFERENCE", (64, 64))
    monkeypatch.setattr(core, "matrix_rate", lambda *_: 1e11)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)  # it would last for the tests after this one
    core.run(["--json", "--modes", "sota", "--sizes", "64", "96", "--no-memory"])
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    for name in ("forward_speedup", "masks_speedup_vs_transformers", "masks_speedup_vs_straightforward"):
        assert figures[name] > 0
    assert figures["total_speedup_vs_transformers"] > 0
    assert figures["label_agreement"] >= 0.999
    assert 0 < figures["flops_utilisation"] < 1
    assert figures["peak_memory_ratio"] is None, "of a 4K source, which was left out"
    assert figures["device"]
    stages = [(case["stage"], case["source"]) for case in figures["cases"]]
    assert stages == [("whole", "64x64"), ("whole", "96x96")] + 2 * [("masks", "64x64"), ("masks", "96x96")]
