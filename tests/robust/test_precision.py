"""Exact float32: the user's shortcuts are off while a verdict is computed, and on again afterwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from robust.classifier import Classifier


@pytest.mark.parametrize("setting", ["high", "medium", "mixed"])
def test_decisions_are_made_in_exact_float32_and_the_user_s_precision_comes_back(setting: str) -> None:
    backends: Any = torch.backends
    nodes = (backends.cudnn.conv, backends.cudnn.rnn, backends.cuda.matmul, backends.mkldnn.matmul)
    before = [node.fp32_precision for node in nodes]
    try:
        if setting == "mixed":  # under which torch refuses to say whether TF32 is allowed
            backends.cudnn.conv.fp32_precision, backends.cuda.matmul.fp32_precision = "ieee", "tf32"
        else:
            torch.set_float32_matmul_precision(setting)
        chosen = [node.fp32_precision for node in nodes]
        with Classifier(nn.Linear(1, 2)).session():
            assert [node.fp32_precision for node in nodes] == ["ieee"] * 4
            assert backends.cudnn.allow_tf32 is False
            assert torch.get_float32_matmul_precision() == "highest"
        assert [node.fp32_precision for node in nodes] == chosen
        assert chosen != ["ieee"] * 4
    finally:
        torch.set_float32_matmul_precision("highest")
        for node, precision in zip(nodes, before, strict=True):
            node.fp32_precision = precision
