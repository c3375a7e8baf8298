"""One process of a training that several share; the first one writes its weights to a file."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from robust.fit import fit
from robust.parallel import join_group
from tests.robust.training_parts import blobs, cross_entropy, linear, small

if __name__ == "__main__":
    kind, out = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    module = linear() if kind == "linear" else small()
    result = fit(
        module, blobs(), loss=cross_entropy, epochs=3, batch_size=8, lr=0.1, optimizer="sgd", ema=0.9,
        valid=blobs(20), keep="valid_accuracy", out=out / "run", seed=5,
    )  # fmt: skip
    group = join_group()
    torch.save([result.history, module.state_dict()], out / f"{kind}-{group.rank}-of-{group.size}.pt")
