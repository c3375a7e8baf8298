"""Claims about `load_model`: what each spec gives, and the one line for everything that cannot be a model."""

from __future__ import annotations

import pickle
import socket
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from robust.classifier import Classifier
from robust.errors import UnknownName
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


def same(clf: Classifier, module: nn.Module, x: Tensor) -> bool:
    with torch.no_grad():
        expected = module.to(clf.device)(x.to(clf.device))
    return torch.allclose(clf.logits(x), expected, rtol=1e-5, atol=1e-5)


# Weights


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model", "model_state_dict"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_state_dicts_are_unwrapped(
    tmp_path: Path, net: nn.Module, x: Tensor, wrapper: str | None, prefix: str
) -> None:
    state = {prefix + key: value for key, value in net.state_dict().items()}
    torch.save(state if wrapper is None else {"epoch": 3, wrapper: state}, tmp_path / "w.pt")
    assert same(load_model("zoo:digits", weights=tmp_path / "w.pt"), net, x)


def test_safetensors_without_batch_norm_counters_are_enough(
    tmp_path: Path, net: nn.Module, x: Tensor
) -> None:
    state = {key: value for key, value in net.state_dict().items() if "num_batches" not in key}
    save_file(state, tmp_path / "w.safetensors")
    assert same(load_model("zoo:digits", weights=str(tmp_path / "w.safetensors")), net, x)


def test_half_precision_weights_are_read_into_float32(tmp_path: Path, net: nn.Module, x: Tensor) -> None:
    save_file({key: value.half() for key, value in net.state_dict().items()}, tmp_path / "w.safetensors")
    clf = load_model("zoo:digits", weights=tmp_path / "w.safetensors", device="cpu")
    assert {parameter.dtype for parameter in clf.module.parameters()} == {torch.float32}
    assert torch.allclose(clf.logits(x), net(x), atol=0.05)


def test_weights_decide_how_many_classes_there_are(tmp_path: Path, x: Tensor) -> None:
    save_file(DigitsNet(classes=4).state_dict(), tmp_path / "w.safetensors")
    for classes in (None, 10, 4):
        clf = load_model("zoo:digits", weights=tmp_path / "w.safetensors", classes=classes)
        assert clf.logits(x).shape == (5, 4)


def test_weights_that_do_not_fit_are_described_in_one_line(tmp_path: Path, net: nn.Module) -> None:
    state = net.state_dict()
    state["extra"] = torch.zeros(1)
    state["conv1.weight"] = torch.zeros(16, 1, 3, 3)
    del state["linear.bias"]
    save_file(state, tmp_path / "w.safetensors")
    fails(
        r"w\.safetensors do not fit zoo:digits: 1 missing \(linear\.bias\); 1 unexpected \(extra\); "
        r"1 of another shape \(conv1\.weight \(16, 1, 3, 3\) instead of \(32, 1, 3, 3\)\)",
        "zoo:digits",
        weights=tmp_path / "w.safetensors",
    )
    fails(r"do not fit zoo:resnet110: .*, \.\.\.\)", "zoo:resnet110", weights=tmp_path / "w.safetensors")


def test_a_pickle_that_could_run_code_is_never_opened(tmp_path: Path, net: nn.Module) -> None:
    flag = tmp_path / "ran"
    torch.save({"state_dict": net.state_dict(), "trap": Trap(flag)}, tmp_path / "zip.pt")
    torch.save({"trap": Trap(flag)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "bare.pkl").write_bytes(pickle.dumps(Trap(flag)))
    torch.save(net, tmp_path / "whole.pt")
    for name in ("zip.pt", "old.pt", "whole.pt"):
        fails(
            r"a pickle that would import \S+: not opened.*state_dict\(\)",
            "zoo:digits",
            weights=tmp_path / name,
        )
    fails("weights .*bare.pkl", "zoo:digits", weights=tmp_path / "bare.pkl")
    assert not flag.exists()


def test_files_that_are_no_weights_get_one_line(tmp_path: Path) -> None:
    fails("none.pt do not exist", "zoo:digits", weights=tmp_path / "none.pt")
    fails("are a folder; give a file", "zoo:digits", weights=tmp_path)
    for name, content in (("a.pt", b""), ("b.pt", b"some text\n"), ("c.pt", b"PK\x03\x04junk")):
        (tmp_path / name).write_bytes(content)
        fails(f"weights .*{name} ", "zoo:digits", weights=tmp_path / name)
    for content in (b"", b"text", b"\xff" * 100):
        (tmp_path / "d.safetensors").write_bytes(content)
        fails("not a readable safetensors file", "zoo:digits", weights=tmp_path / "d.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that TorchScript is old
        torch.jit.save(torch.jit.script(nn.Linear(2, 2)), tmp_path / "e.pt")
    fails(
        "cannot be read as safetensors or as a state dict .*TorchScript",
        "zoo:digits",
        weights=tmp_path / "e.pt",
    )


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (torch.zeros(3), "hold a Tensor, not a state dict"),
        ({"epoch": 3, "optimizer": {}}, "hold the keys epoch, optimizer, not"),
        ({}, "hold nothing, not"),
        ({"state_dict": {"a": 1}}, "hold the keys state_dict"),
    ],
)
def test_checkpoints_without_a_state_dict_say_what_they_hold(
    tmp_path: Path, content: object, line: str
) -> None:
    torch.save(content, tmp_path / "w.pt")
    fails(line, "zoo:digits", weights=tmp_path / "w.pt")


def test_an_architecture_without_weights_must_be_wanted_fresh(x: Tensor) -> None:
    fails("zoo:lenet5 is an architecture without weights; give weights=FILE", "zoo:lenet5")
    torch.manual_seed(1)
    first = load_model("zoo:digits", fresh=True, classes=3, device="cpu")
    torch.manual_seed(1)
    assert same(first, DigitsNet(classes=3).eval(), x)
    fails("classes=0 is no number of classes", "zoo:digits", fresh=True, classes=0)


# Names, normalisation, devices


@pytest.mark.parametrize(
    ("spec", "line"),
    [
        ("resnet20", "did you mean zoo:resnet20"),
        ("zoo:", "lacks what stands behind the colon"),
        ("zoo:lenet", "did you mean lenet5"),
        ("torchvision:resnet19", "unknown torchvision model 'resnet19'; did you mean .*resnet1"),
        ("torchvision:fasterrcnn_resnet50_fpn", "unknown torchvision model"),
        (
            "timm:resnet18",
            r"unknown model 'timm:resnet18'; a model is zoo:NAME, torchvision:NAME, FILE\.py:FACTORY",
        ),
        ("onnx:a.onnx", "a.onnx does not exist; give onnx:FILE"),
        ("http://localhost:9", "does not answer: no connection"),
        ("model.py", "which function of the file makes the model: model.py:FACTORY"),
        ("net.pt2", "did you mean exported:net.pt2"),
        ("w.safetensors", "weights need an architecture"),
        ("w.pth", "weights need an architecture"),
        ("", "a model is"),
        ("exported:", "lacks what stands behind the colon"),
    ],
)
def test_a_bad_spec_gets_one_line(spec: str, line: str) -> None:
    fails(line, spec)


def test_normalisation_is_inside_the_classifier(net: nn.Module, x: Tensor, tmp_path: Path) -> None:
    save_file(net.state_dict(), tmp_path / "w.safetensors")
    weights = tmp_path / "w.safetensors"
    for mean, std in ((0.2, 0.5), ((0.2,), (0.5,)), ([0.2], 0.5)):
        clf = load_model("zoo:digits", weights=weights, mean=mean, std=std, device="cpu")
        assert torch.allclose(clf.logits(x), net((x - 0.2) / 0.5), atol=1e-5)
    assert clf.name == "zoo:digits"


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"std": 0.0}, "std=0.0 cannot normalise; .*above 0"),
        ({"std": (0.1, -1.0, 0.2)}, "above 0"),
        ({"mean": float("nan")}, "mean=nan cannot normalise; .*finite"),
        ({"mean": ()}, "cannot normalise"),
        ({"mean": "grey"}, "is not a number or a list of numbers"),
        ({"bounds": (1.0, 0.0)}, "is no box"),
    ],
)
def test_impossible_normalisation_gets_one_line(options: dict[str, object], line: str) -> None:
    fails(line, "zoo:digits", fresh=True, **options)


@pytest.mark.parametrize("device", ["cuda:99", "gpu", "xpu"])
def test_an_absent_device_gets_one_line_before_anything_is_loaded(device: str) -> None:
    fails(f"device '{device}' is not on this machine, which has cpu", "zoo:none", device=device)


# Factories


def script(folder: Path, text: str, name: str = "model.py") -> Path:
    (folder / name).write_text(text)
    return folder / name


NET = """
import torch
from torch import nn

def make():
    torch.manual_seed(5)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

class Net(nn.Module):
    def __init__(self, width=10):
        super().__init__()
        self.linear = nn.Linear(64, width)
    def forward(self, x):
        return self.linear(x.flatten(1))

ready = make()
def needs(width): return Net(width)
def wrong(): return [1]
def broken():
    return undefined_name
number = 3
"""


def test_a_factory_may_be_a_function_a_class_or_a_module(tmp_path: Path, x: Tensor) -> None:
    path = script(tmp_path, NET)
    torch.manual_seed(5)
    expected = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    assert same(load_model(f"{path}:make"), expected, x)
    assert same(load_model(f"{path}:ready"), expected, x)
    clf = load_model(f"{path}:Net", mean=0.5)
    assert (clf.logits(x).shape, clf.name) == ((5, 10), "model.py:Net")


def test_weights_are_loaded_into_what_the_factory_made(tmp_path: Path, x: Tensor) -> None:
    path = script(tmp_path, NET)
    linear = nn.Linear(64, 10)
    save_file(
        {f"linear.{key}": value for key, value in linear.state_dict().items()}, tmp_path / "w.safetensors"
    )
    clf = load_model(f"{path}:Net", weights=tmp_path / "w.safetensors")
    assert same(clf, nn.Sequential(nn.Flatten(), linear), x)
    fails("do not fit model.py:make: 2 missing", f"{path}:make", weights=tmp_path / "w.safetensors")


@pytest.mark.parametrize(
    ("factory", "line"),
    [
        ("mak", "unknown factory 'mak'; did you mean make"),
        ("nothing_like_it", "known are Net, broken, make, needs, ready, wrong"),
        ("needs", "cannot be called without arguments: missing a required argument: 'width'"),
        ("wrong", "returned list; expected a torch.nn.Module or a Classifier"),
        ("broken", "failed: line 20: NameError: name 'undefined_name' is not defined"),
        ("number", "is no function but int"),
        ("", "names no factory"),
        ("make()", "names no factory"),
    ],
)
def test_a_bad_factory_gets_one_line(tmp_path: Path, factory: str, line: str) -> None:
    fails(line, f"{script(tmp_path, NET)}:{factory}")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("def make(:\n", "cannot be loaded: line 1: invalid syntax"),
        ("\nimport no_such_package\n", "line 2: ModuleNotFoundError: No module named 'no_such_package'"),
        ("\n\nraise ValueError('two\\nlines')\n", "line 3: ValueError: two lines"),
        ("import sys\nsys.exit('usage')\n", "line 2: SystemExit: usage"),
        ("assert False\n", "line 1: AssertionError$"),
        ("", "defines no 'make'"),
        ("x = '\0'\n", "cannot be loaded"),
    ],
)
def test_a_file_that_does_not_load_gets_one_line(tmp_path: Path, text: str, line: str) -> None:
    fails(line, f"{script(tmp_path, text)}:make")


def test_a_missing_file_gets_one_line(tmp_path: Path) -> None:
    fails("none.py does not exist; a model is FILE.py:FACTORY", f"{tmp_path / 'none.py'}:make")


def test_a_factory_file_may_import_its_neighbours_and_hides_no_other_module(
    tmp_path: Path, x: Tensor
) -> None:
    script(tmp_path, NET, "private_neighbour.py")
    text = "from dataclasses import dataclass\nfrom private_neighbour import make\n@dataclass\nclass A:\n    b: 'int'\n"
    path = script(tmp_path, text, "json.py")
    before, known = list(sys.path), sys.modules.get("json")
    assert load_model(f"{path}:make").logits(x).shape == (5, 10)
    assert sys.path == before
    assert sys.modules.get("json") is known
    sys.modules.pop("private_neighbour")


def test_a_factory_s_classifier_is_taken_as_it_is(tmp_path: Path, x: Tensor) -> None:
    text = NET + "\ndef wrapped():\n    from robust import Classifier\n"
    text += "    return Classifier(make(), bounds=(0, 2), mean=0.5, name='mine')\n"
    spec = f"{script(tmp_path, text)}:wrapped"
    clf = load_model(spec)
    assert (clf.name, clf.bounds, float(clf.mean)) == ("mine", (0.0, 2.0), 0.5)
    assert load_model(spec, bounds=(0.0, 2.0), device="cpu").bounds == (0.0, 2.0)
    fails("normalises for itself", spec, mean=0.1)
    fails("bounds=", spec, bounds=(-1.0, 1.0))
    fails("let the factory put it on meta", spec, device="meta")


# torchvision


def test_a_torchvision_architecture_takes_weights_from_a_file(tmp_path: Path) -> None:
    from torchvision import models

    torch.manual_seed(0)
    theirs = models.squeezenet1_1(num_classes=4).eval()
    save_file(theirs.state_dict(), tmp_path / "w.safetensors")
    clf = load_model("torchvision:squeezenet1_1", weights=tmp_path / "w.safetensors", classes=4)
    assert same(clf, theirs, torch.rand(2, 3, 64, 64))
    fails("without weights; give weights=FILE, or weights='DEFAULT'", "torchvision:squeezenet1_1")


def test_weights_that_cannot_be_downloaded_say_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise socket.gaierror("no network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    fails(
        r"could not be downloaded from https://.*squeezenet.*give them as a file",
        "torchvision:squeezenet1_1",
        weights="DEFAULT",
    )


def test_downloaded_weights_bring_their_normalisation(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision import models

    def hub(self: object, *arguments: object, **options: object) -> object:
        return models.squeezenet1_1().state_dict()

    monkeypatch.setattr(models.SqueezeNet1_1_Weights, "get_state_dict", hub)
    clf = load_model("torchvision:squeezenet1_1", weights="DEFAULT")
    assert [round(value, 3) for value in clf.mean.flatten().tolist()] == [0.485, 0.456, 0.406]
    assert [round(value, 3) for value in clf.std.flatten().tolist()] == [0.229, 0.224, 0.225]
    mine = load_model("torchvision:squeezenet1_1", weights="DEFAULT", mean=0.5, std=0.5)
    assert mine.mean.flatten().tolist() == [0.5]


def test_unknown_names_are_of_their_own_kind() -> None:
    with pytest.raises(UnknownName):
        load_model("zoo:none")
