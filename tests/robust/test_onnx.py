"""`onnx:FILE`: the same answers as the model it was exported from, whatever its types, layout and batch."""

from __future__ import annotations

import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from robust import Classifier, Linf, Oracle, evaluate, load_data, load_model
from robust.errors import ModelError, RobustError

onnx = pytest.importorskip("onnx", reason="ONNX tests need the extra `test` (onnx)")
pytest.importorskip("onnxruntime", reason="ONNX tests need the extra `onnx` (onnxruntime)")

WEIGHT = torch.randn(3, 12, generator=torch.Generator().manual_seed(0))
X = torch.rand(7, 3, 2, 2, generator=torch.Generator().manual_seed(1))
WHOLE = (None, 3, 2, 2)


def build(
    path: Path,
    shape: tuple[int | str | None, ...] = WHOLE,
    kind: str = "FLOAT",
    *,
    inputs: int = 1,
    outputs: tuple[str, ...] = ("scores",),
) -> Path:
    """A linear model of flattened images in the file's own layout; output "label" is its arg max."""
    helper, types = onnx.helper, onnx.TensorProto
    given = [helper.make_tensor_value_info(f"x{k}", getattr(types, kind), shape) for k in range(inputs)]
    nodes = [helper.make_node("Cast", ["x0"], ["cast"], to=types.FLOAT)]
    layout = "cast"
    if len(shape) == 4 and shape[-1] == 3:
        nodes.append(helper.make_node("Transpose", ["cast"], ["chw"], perm=[0, 3, 1, 2]))
        layout = "chw"
    nodes.append(helper.make_node("Flatten", [layout], ["flat"], axis=1))
    nodes += [helper.make_node("MatMul", ["flat", "w"], [name]) for name in outputs if name != "label"]
    if "label" in outputs:
        scores = next((name for name in outputs if name != "label"), "hidden")
        nodes += [] if scores != "hidden" else [helper.make_node("MatMul", ["flat", "w"], ["hidden"])]
        nodes.append(helper.make_node("ArgMax", [scores], ["label"], axis=1, keepdims=0))
    told = [helper.make_tensor_value_info(name, types.INT64, [None]) if name == "label" else
            helper.make_tensor_value_info(name, types.FLOAT, [None, 3]) for name in outputs]  # fmt: skip
    weight = onnx.numpy_helper.from_array(WEIGHT.T.contiguous().numpy(), "w")
    graph = helper.make_graph(nodes, "linear", given, told, [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, path)
    return path


def load(path: Path | str, **options: Any) -> Oracle:
    """The oracle of a file."""
    oracle = load_model(f"onnx:{path}", **options)
    assert isinstance(oracle, Oracle)
    return oracle


def right(x: Tensor = X) -> Tensor:
    """What the linear model says."""
    return x.flatten(1) @ WEIGHT.T


@pytest.mark.parametrize(
    "shape",
    [WHOLE, ("n", "c", "h", "w"), (4, 3, 2, 2), (1, 3, 2, 2), (None, 2, 2, 3), (5, 2, 2, 3), (None, 12),
     (None, None, None, 3)],
    ids=str,
)  # fmt: skip
def test_layouts_and_batches(shape: Any, tmp_path: Path) -> None:
    oracle = load(build(tmp_path / "m.onnx", shape))
    torch.testing.assert_close(oracle.scores(X), right())
    torch.testing.assert_close(oracle.scores(X[:1]), right(X[:1]))
    assert (oracle.classes, oracle.cost.queries, oracle.remote) == (3, 8, False)


@pytest.mark.parametrize(
    ("kind", "tolerance"), [("FLOAT", 1e-6), ("DOUBLE", 1e-6), ("FLOAT16", 5e-3), ("UINT8", None)]
)
def test_input_types(kind: str, tolerance: float | None, tmp_path: Path) -> None:
    oracle = load(build(tmp_path / "m.onnx", kind=kind))
    if tolerance is None:  # the box is what a byte can hold
        torch.testing.assert_close(oracle.scores(X), right((X * 255).round()))
        signed = load(tmp_path / "m.onnx", bounds=(-1, 1))
        torch.testing.assert_close(signed.scores(2 * X - 1), right(((2 * X - 1 + 1) * 127.5).round()))
        with pytest.raises(ModelError, match="takes uint8 images, which are not normalised"):
            load(tmp_path / "m.onnx", mean=0.5)
    else:
        torch.testing.assert_close(oracle.scores(X), right(), atol=tolerance, rtol=tolerance)


def test_normalisation_and_box_are_the_classifier_s(tmp_path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3, bias=False))
    with torch.no_grad():
        module[1].weight.copy_(WEIGHT)
    statistics: dict[str, Any] = {"mean": (100, 120, 140), "std": (50, 60, 70), "bounds": (0, 255)}
    clf = Classifier(module, **statistics)
    oracle = load(build(tmp_path / "m.onnx"), **statistics)
    torch.testing.assert_close(oracle.scores(255 * X), clf.logits(255 * X))
    assert oracle.bounds == (0, 255)
    with pytest.raises(ModelError, match="mean has 2 values for 3 channels"):
        load(tmp_path / "m.onnx", mean=(1, 2)).scores(X)


def test_the_output_with_the_scores_is_found_or_named(tmp_path: Path) -> None:
    path = build(tmp_path / "m.onnx", outputs=("label", "scores"))
    torch.testing.assert_close(load(path).scores(X), right())
    assert torch.equal(load(path, answers="labels", classes=3).labels(X), right().argmax(1))
    path = build(tmp_path / "two.onnx", outputs=("scores", "features"))
    with pytest.raises(
        ModelError, match=r"2 outputs that may be the scores: scores, features; say which: onnx:.*#sc"
    ):
        load(path)
    torch.testing.assert_close(load(f"{path}#features").scores(X), right())
    with pytest.raises(ModelError, match="has no output 'logits'; it has scores, features"):
        load(f"{path}#logits")
    path = build(tmp_path / "labels.onnx", outputs=("label",))
    assert torch.equal(load(path, answers="labels", classes=3).labels(X), right().argmax(1))
    with pytest.raises(ModelError, match="its labels can be had with answers=labels"):
        load(path)


def test_the_identity_is_the_file_s_bytes_its_external_data_s_and_the_settings(tmp_path: Path) -> None:
    path = build(tmp_path / "m.onnx")
    digests = {
        load(path).backend.digest(),
        load(path, mean=0.5).backend.digest(),
        load(path, bounds=(-1, 1)).backend.digest(),
    }
    shutil.copy(path, tmp_path / "again.onnx")
    assert load(tmp_path / "again.onnx").backend.digest() in digests
    digests.add(load(build(tmp_path / "other.onnx", (None, 12))).backend.digest())
    assert len(digests) == 4
    model = onnx.load(path)
    onnx.save(
        model, tmp_path / "big.onnx", save_as_external_data=True, location="big.onnx.data", size_threshold=0
    )
    before = load(tmp_path / "big.onnx").backend.digest()
    raw = bytearray((tmp_path / "big.onnx.data").read_bytes())
    raw[3] ^= 1
    (tmp_path / "big.onnx.data").write_bytes(raw)
    assert load(tmp_path / "big.onnx").backend.digest() != before


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda path: None, "does not exist; give onnx:FILE"),
        (lambda path: path.mkdir(), "is a folder; give onnx:FILE"),
        (lambda path: path.write_bytes(b"no model"), "cannot be read as an ONNX model: "),
        (lambda path: path.write_bytes(b""), "cannot be read as an ONNX model: "),
        (lambda path: build(path, inputs=2), r"takes 2 inputs \(x0, x1\); a classifier takes one"),
        (lambda path: build(path, kind="INT64"), r"takes tensor\(int64\); images are float"),
        (lambda path: build(path, (None, 3, 4, 1)), r"takes inputs \(3, 4, 1\), which images \(3, 2, 2\) do not fit"),
    ],
)  # fmt: skip
def test_what_is_no_model_is_one_line(make: Any, line: str, tmp_path: Path) -> None:
    make(tmp_path / "m.onnx")
    with pytest.raises(ModelError, match=line) as error:
        load(tmp_path / "m.onnx").scores(X)
    assert "\n" not in str(error.value)


def test_impossible_requests_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = build(tmp_path / "m.onnx")
    for options, line in (({"weights": "w"}, "has its own weights"), ({"endpoint": {"timeout": 1}}, "is no endpoint"),
                          ({"answers": "logits"}, "'scores' or 'labels'")):  # fmt: skip
        with pytest.raises(RobustError, match=line):
            load(path, **options)
    if not torch.cuda.is_available():
        with pytest.raises(ModelError, match="does not run on cuda"):
            load(path, device="cuda")
    assert load(path, device="cpu").backend.describe()["provider"] == "CPUExecutionProvider"
    with pytest.raises(RobustError, match=r"did you mean onnx:net\.onnx\?"):
        load_model("net.onnx")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ModelError, match=r"needs ONNX Runtime: pip install 'robust-toolkit\[onnx\]'"):
        load(path)


def export(clf: Classifier, path: Path, x: Tensor) -> Path:
    """A classifier's module, normalisation left out, as torch exports it."""
    pytest.importorskip("onnxscript", reason="torch.onnx.export needs onnxscript")
    batch = torch.export.Dim("batch", min=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            clf.module, (clf.normalise(x),), path, dynamo=True, dynamic_shapes=({0: batch},), verbose=False
        )
    return path


def test_an_exported_model_gives_the_same_answers_and_the_same_verdict(tmp_path: Path) -> None:
    clf = load_model("zoo:digits")
    x, y = load_data("digits", n=24).tensors()
    path = export(clf, tmp_path / "digits.onnx", x[:2])
    statistics: dict[str, Any] = {"mean": clf.mean.flatten().tolist(), "std": clf.std.flatten().tolist()}
    local, oracle = Oracle(clf), load(path, **statistics)
    noise = torch.rand(40, *x.shape[1:], generator=torch.Generator().manual_seed(0))
    for points in (x, noise):
        assert float((oracle.scores(points) - local.scores(points)).abs().max()) <= 1e-4
    call: dict[str, Any] = {"threat": Linf(0.15), "suite": ["square"], "report": False}
    ours = evaluate(Oracle(clf, budget=4000), x, y, **call)
    theirs = evaluate(load(path, budget=4000, **statistics), x, y, out=tmp_path / "run", **call)
    assert 0 < ours.robust_accuracy < ours.clean_accuracy
    assert theirs.broken_by == ours.broken_by
    assert theirs.cost["queries"] == ours.cost["queries"]
    theirs.verify(load(path, **statistics), x, y)
    assert theirs.manifest["oracle"]["file"] == str(path)
    assert np.isfinite(theirs.distance[~theirs.robust & theirs.correct].numpy()).all()
