"""Claims about the zoo: its architectures are the published ones, and its weights do what their cards say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn

from robust import zoo
from robust.data import load_data
from robust.errors import ModelError, UnknownName
from robust.models import load_model
from robust.zoo.resnet_cifar import CifarResNet, Shortcut

SHAPES = {"lenet5": (1, 28, 28), "digits": (1, 8, 8), "convnet-grey": (1, 28, 28), "tanh-mnist": (1, 28, 28)}
CIFAR_MEAN, CIFAR_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def build(name: str, classes: int = 10) -> nn.Module:
    """The architecture in eval mode, its batch norms' statistics no longer those of the start."""
    torch.manual_seed(0)
    module: nn.Module = zoo.get(name)(classes=classes)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean = torch.rand(part.num_features) - 0.5
            part.running_var = torch.rand(part.num_features) + 0.5
    return module.eval()


def images(name: str, n: int = 3) -> Tensor:
    return torch.rand(n, *SHAPES.get(name, (3, 32, 32)), generator=torch.Generator().manual_seed(1))


def accuracy(model: str, weights: Path, x: Tensor, y: Tensor, **options: object) -> float:
    clf = load_model(model, weights=weights, device="cpu", **options)  # type: ignore[arg-type]
    found = torch.cat([clf.logits(part).argmax(1) for part in x.split(64)])
    return float((found == y).double().mean())


@pytest.mark.parametrize("name", zoo.REGISTRY)
def test_logits_have_one_column_per_class_for_any_batch(name: str) -> None:
    module = build(name, classes=7)
    for n in (1, 3):
        assert module(images(name, n)).shape == (n, 7)


@pytest.mark.parametrize("name", zoo.REGISTRY)
def test_channels_last_gives_the_same_logits_and_gradients(name: str) -> None:
    module, x = build(name), images(name)
    answers = []
    for layout in (torch.contiguous_format, torch.channels_last):
        point = x.to(torch.float64, memory_format=layout).requires_grad_()
        logits = module.to(torch.float64, memory_format=layout)(point)  # type: ignore[call-overload]
        answers.append((logits, *torch.autograd.grad(logits.logsumexp(1).sum(), point)))
    for plain, last in zip(*answers, strict=True):
        torch.testing.assert_close(plain, last)


@pytest.mark.parametrize("name", zoo.REGISTRY)
def test_the_graph_can_be_traced(name: str) -> None:
    module, x = build(name), images(name)
    torch.testing.assert_close(fx.symbolic_trace(module)(x), module(x))


@pytest.mark.parametrize("name", ["resnet20", "lenet5", "convnet", "digits"])
def test_the_program_can_be_exported_for_any_batch(name: str) -> None:
    module = build(name)
    dynamic = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(module, (images(name, 3),), dynamic_shapes=dynamic)
    torch.testing.assert_close(program.module()(images(name, 5)), module(images(name, 5)))


@pytest.mark.parametrize("name", zoo.REGISTRY)
def test_no_architecture_flattens_with_view(name: str) -> None:
    module, _, _ = zoo.REGISTRY[name].partition(":")
    source = Path(zoo.__file__).with_name(module.rpartition(".")[2] + ".py").read_text()
    assert not re.search(r"\.view\(", source)


@pytest.mark.parametrize(("depth", "millions"), [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85), (110, 1.7)])
def test_cifar_resnets_have_the_published_size(depth: int, millions: float) -> None:
    module = zoo.get(f"resnet{depth}")()
    size = sum(parameter.numel() for parameter in module.parameters())
    assert abs(size / 1e6 - millions) < 0.05 * millions  # He et al. 2016, table 6
    layers = sum(isinstance(part, nn.Conv2d | nn.Linear) for part in module.modules())
    assert layers == depth


def test_depths_that_are_not_6n_plus_2_are_refused() -> None:
    for depth in (18, 2, 51):
        with pytest.raises(ValueError, match="is not 6n"):
            CifarResNet(depth)


def test_the_shortcut_subsamples_and_pads_with_zeros_on_both_sides() -> None:
    x = torch.rand(2, 16, 5, 4)
    out = Shortcut(16)(x)
    assert out.shape == (2, 32, 3, 2)
    assert torch.equal(out[:, 8:24], x[:, :, ::2, ::2])
    assert not out[:, :8].any()
    assert not out[:, 24:].any()


def test_shared_weights_fit_by_name_and_nothing_is_left_over(shared: Path) -> None:
    from safetensors.torch import load_file

    for name, file in (("resnet20", "cifar10_resnet20"), ("lenet5", "mnist_lenet5")):
        theirs = load_file(shared / "weights" / f"{file}.safetensors")
        ours = {
            k: v for k, v in zoo.get(name)().state_dict().items() if not k.endswith("num_batches_tracked")
        }
        assert {k: v.shape for k, v in theirs.items()} == {k: v.shape for k, v in ours.items()}


def test_resnet20_reaches_its_accuracy_on_cifar10(shared: Path, cifar10_test: Path) -> None:
    weights = shared / "weights" / "cifar10_resnet20.safetensors"
    x, y = load_data(f"imagefolder:{cifar10_test}", n=1000).tensors()
    found = accuracy("zoo:resnet20", weights, x, y, mean=CIFAR_MEAN, std=CIFAR_STD)
    assert abs(found - 0.912) <= 0.003


@pytest.mark.parametrize(("name", "floor"), [("cifar10-convnet", 0.73), ("cifar10-gaussian", 0.6)])
def test_shipped_networks_bring_their_normalisation_and_are_accurate_on_cifar10(
    name: str, floor: float, root: Path, cifar10_test: Path
) -> None:
    from robust.training import load_train_config

    entry = zoo.ENTRIES[name]
    config = load_train_config(root / entry.recipe)
    assert (entry.mean, entry.std, entry.data) == (config.mean, config.std, config.data)
    clf = load_model(f"zoo:{name}", device="cpu")
    assert clf.mean.flatten().tolist() == pytest.approx(entry.mean)
    x, y = load_data(f"imagefolder:{cifar10_test}", n=1000).tensors()
    found = torch.cat([clf.logits(part).argmax(1) for part in x.split(64)])
    assert float((found == y).double().mean()) > floor


def test_lenet5_reaches_its_accuracy_on_mnist(shared: Path) -> None:
    x, y = load_data("mnist", root=shared / "data", n=1000).tensors()
    found = accuracy("zoo:lenet5", shared / "weights" / "mnist_lenet5.safetensors", x, y)
    assert abs(found - 0.989) <= 0.006  # 98.9 % on all 10,000, 98.4 % on the first 1,000


def test_the_robust_lenet5_is_accurate_on_mnist(shared: Path) -> None:
    x, y = load_data("mnist", root=shared / "data", n=1000).tensors()
    found = load_model("zoo:mnist-at", device="cpu").logits(x).argmax(1)
    assert float((found == y).double().mean()) > 0.97


@pytest.mark.parametrize("name", ["digits", "digits-at"])
def test_shipped_weights_are_small_and_accurate(name: str, root: Path) -> None:
    entry = zoo.ENTRIES[name]
    assert entry.path.stat().st_size < 1_000_000
    assert (root / entry.recipe).is_file()
    x, y = load_data(entry.data).tensors()
    found = load_model(f"zoo:{name}", device="cpu").logits(x).argmax(1)
    assert float((found == y).double().mean()) > (0.98 if name == "digits" else 0.95)


@pytest.mark.parametrize("name", zoo.ENTRIES)
def test_every_entry_names_a_known_architecture_and_known_data(name: str) -> None:
    from robust.data import REGISTRY

    entry = zoo.ENTRIES[name]
    assert entry.architecture in zoo.REGISTRY
    assert entry.data in REGISTRY
    assert entry.card


def test_the_digits_network_learns_within_a_few_epochs() -> None:
    torch.manual_seed(0)
    module = zoo.get("digits")()
    x, y = load_data("digits", train=True).tensors()
    optimiser = torch.optim.Adam(module.parameters(), lr=3e-3)
    for _ in range(4):
        for rows in torch.randperm(len(x)).split(128):
            optimiser.zero_grad()
            nn.functional.cross_entropy(module(x[rows]), y[rows]).backward()
            optimiser.step()
    x, y = load_data("digits").tensors()
    assert float((module.eval()(x).argmax(1) == y).double().mean()) > 0.94


def test_absent_shipped_weights_get_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(zoo, "WEIGHTS", tmp_path)
    with pytest.raises(ModelError, match=r"digits\.safetensors are absent; reinstall .*digits\.toml$"):
        load_model("zoo:digits")


def test_an_unknown_architecture_names_the_nearest() -> None:
    with pytest.raises(UnknownName, match=r"unknown zoo model 'resnet21'; did you mean .*resnet20"):
        load_model("zoo:resnet21")
