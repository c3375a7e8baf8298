"""Claims about `exported:FILE.pt2`: any batch, eval mode, and nothing unpickled."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from robust.errors import ModelError
from robust.models import load_model
from robust.zoo.digits import DigitsNet
from tests.robust.pictures import Trap
from tests.robust.pictures import fails_model as fails


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(3)
    return DigitsNet().eval()


@pytest.fixture
def x() -> Tensor:
    return torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def export(module: nn.Module, path: Path, batch: object, n: int = 4) -> str:
    """A saved program; `batch` is None (fixed at n), or a dynamic dimension."""
    dynamic = None if batch is None else ({0: batch},)
    program = torch.export.export(module, (torch.rand(n, 1, 8, 8),), dynamic_shapes=dynamic)
    torch.export.save(program, path)
    return f"exported:{path}"


@pytest.mark.parametrize("kind", ["fixed", "any", "range"])
def test_an_exported_program_takes_any_batch(tmp_path: Path, net: nn.Module, kind: str) -> None:
    batch = {"fixed": None, "any": torch.export.Dim("b"), "range": torch.export.Dim("b", min=3, max=6)}[kind]
    clf = load_model(export(net, tmp_path / "n.pt2", batch), device="cpu")
    for n in (1, 3, 4, 6, 7, 9):
        x = torch.rand(n, 1, 8, 8, requires_grad=True)
        logits = clf(x)
        assert torch.allclose(logits, net(x), atol=1e-5)
        (ours,) = torch.autograd.grad(logits.square().sum(), x)
        (theirs,) = torch.autograd.grad(net(x).square().sum(), x)
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_an_exported_program_passes_the_classifiers_own_checks(
    tmp_path: Path, net: nn.Module, x: Tensor
) -> None:
    clf = load_model(export(net, tmp_path / "n.pt2", None), mean=0.1, std=2.0)
    assert clf.check(x) == []
    assert clf.name == "exported:n.pt2"
    assert len(clf.digest()) == 64


def test_an_exported_program_says_which_images_it_takes(tmp_path: Path, net: nn.Module) -> None:
    clf = load_model(export(net, tmp_path / "n.pt2", None), device="cpu")
    with pytest.raises(ModelError, match=r"was exported for images \(1, 8, 8\), not \(3, 8, 8\)"):
        clf(torch.rand(4, 3, 8, 8))


def test_a_program_exported_in_train_mode_is_refused(tmp_path: Path) -> None:
    spec = export(DigitsNet().train(), tmp_path / "n.pt2", None)
    fails(r"was exported in train mode; call model\.eval\(\)", spec)


def test_a_program_of_two_inputs_is_no_classifier(tmp_path: Path) -> None:
    class Two(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return a + b

    program = torch.export.export(Two(), (torch.rand(2, 3), torch.rand(2, 3)))
    torch.export.save(program, tmp_path / "n.pt2")
    fails("takes 2 inputs; a classifier takes one tensor", f"exported:{tmp_path / 'n.pt2'}")


def test_files_that_are_no_programs_get_one_line(tmp_path: Path, net: nn.Module) -> None:
    fails("does not exist; give exported:FILE.pt2", f"exported:{tmp_path / 'none.pt2'}")
    (tmp_path / "text.pt2").write_text("text")
    fails("not a program saved by torch.export.save", f"exported:{tmp_path / 'text.pt2'}")
    torch.save(net.state_dict(), tmp_path / "state.pt2")
    fails("cannot be read as a program", f"exported:{tmp_path / 'state.pt2'}")
    spec = export(net, tmp_path / "n.pt2", None)
    fails("carries its own weights", spec, weights=tmp_path / "state.pt2")


def replaced(path: Path, end: str, content: bytes) -> str:
    """The archive with the part whose name ends in `end` replaced, or added if there is none."""
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    own = [name for name in parts if name.endswith(end)] or [f"{path.stem}/{end}"]
    with zipfile.ZipFile(path, "w") as archive:
        for name, old in {**parts, own[0]: content}.items():
            archive.writestr(name, content if name == own[0] else old)
    return f"exported:{path}"


def test_an_exported_program_cannot_smuggle_a_pickle(tmp_path: Path, net: nn.Module) -> None:
    flag, path = tmp_path / "ran", tmp_path / "n.pt2"
    torch.save({"trap": Trap(flag)}, tmp_path / "trap.pt")
    export(net, path, None)
    fails(
        "cannot be read as a program",
        replaced(path, "sample_inputs/model.pt", (tmp_path / "trap.pt").read_bytes()),
    )
    export(net, path, None)
    with zipfile.ZipFile(path) as archive:
        config = archive.read("n/data/weights/model_weights_config.json").replace(b"false", b"true")
    replaced(path, "model_weights_config.json", config)
    fails(
        "cannot be read as a program", replaced(path, "weights/weight_0", (tmp_path / "trap.pt").read_bytes())
    )
    export(net, path, None)
    for part in ("data/constants/opaque_obj_0", "data/aotinductor/model/a.so"):
        export(net, path, None)
        fails("which would run when read: not opened", replaced(path, part, pickle.dumps(Trap(flag))))
    assert not flag.exists()
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ
