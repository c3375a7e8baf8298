"""Footprints: what one pass costs, and the batch shapes that follow."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from robust import Classifier, Linf
from robust.attacks import get
from robust.footprint import Footprint, largest_batch, measure


def test_footprint_counts_operations_and_activations() -> None:
    clf = Classifier(
        nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(800, 10)).eval()
    )
    found = measure(clf, torch.rand(5, 3, 10, 10))
    assert found is not None
    assert found.flops == 2 * (100 * 8 * 27 + 800 * 10)
    assert found.largest == 800 * 4
    assert found.total >= 2 * 800 * 4 + 10 * 4
    assert clf.cost.forwards == 0
    assert measure(clf, torch.zeros(0, 3, 10, 10)) is found, "it is measured once"


def test_footprint_leaves_the_generators_alone() -> None:
    clf = Classifier(nn.Sequential(nn.Dropout(0.5), nn.Flatten(), nn.Linear(12, 3)))
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    measure(clf, torch.zeros(1, 3, 2, 2))
    assert torch.equal(torch.rand(4), expected)


def test_model_that_cannot_be_watched_has_none() -> None:
    class Shy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("not now")

    assert measure(Classifier(Shy()), torch.zeros(1, 3, 2, 2)) is None


@pytest.mark.parametrize(("largest", "batch"), [(1, 64), (1 << 40, 8)])
def test_batches_stay_within_bounds(largest: int, batch: int) -> None:
    assert largest_batch(Footprint(1.0, largest, largest), torch.device("cpu")) == batch


def test_larger_activations_mean_smaller_batches() -> None:
    sizes = [
        largest_batch(Footprint(1.0, size, size), torch.device("cpu")) for size in (1 << 16, 1 << 18, 1 << 20)
    ]
    assert sizes == sorted(sizes, reverse=True)
    assert all(size & (size - 1) == 0 for size in sizes)


class Narrow(nn.Module):
    """Runs out of memory on more than six points."""

    def __init__(self, message: str) -> None:
        super().__init__()
        self.linear, self.message, self.refused = nn.Linear(48, 5), message, 0

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > 6:
            self.refused += 1
            raise torch.OutOfMemoryError("no room") if not self.message else RuntimeError(self.message)
        return self.linear(x.flatten(1))


@pytest.mark.parametrize("message", ["", "DefaultCPUAllocator: can't allocate memory: you tried 8 bytes"])
@pytest.mark.parametrize("name", ["pgd", "fab", "square"])
def test_memory_that_runs_out_halves_the_batch_and_the_attack_goes_on(name: str, message: str) -> None:
    torch.manual_seed(0)
    module = Narrow(message).eval()
    clf = Classifier(module)
    x = torch.rand(30, 3, 4, 4)
    y = torch.cat([clf.logits(part) for part in x.split(6)]).argmax(1)
    clf._checked = True
    monitored = get(name)(
        threat=Linf(0.2), until="broken", **({"queries": 20} if name == "square" else {"steps": 5})
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("robust.decide.BATCH", 6)
        result = monitored.run(clf, x, y, precision="original")
        refused = module.refused
        wide = Classifier(nn.Sequential(nn.Flatten(), module.linear).eval())
        reference = monitored.run(wide, x, y, precision="original")
    assert result.success.any()
    assert torch.equal(result.success, reference.success)
    assert 0 < refused <= 20, "it learns from the first time"


def test_other_errors_are_no_reason_to_halve() -> None:
    module = Narrow("shapes do not match").eval()
    clf = Classifier(module)
    clf._checked = True
    with pytest.raises(RuntimeError, match="shapes do not match"):
        get("pgd")(threat=Linf(0.2))(clf, torch.rand(30, 3, 4, 4), torch.zeros(30, dtype=torch.long))
