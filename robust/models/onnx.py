"""An ONNX file as it is deployed: ONNX Runtime answers, on the CPU or a CUDA device, and gives no gradients."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robust.data.fetch import one_line
from robust.errors import ModelError
from robust.models.deployed import Asked
from robust.oracle import Backend, Oracle

_FLOATS = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(double)": np.float64}
_WHOLE = ("tensor(int64)", "tensor(int32)")
_HEAD = 1 << 26  # bytes of a file in which the names of its external data are looked for
Shape = tuple[int | None, ...]


def onnx(rest: str, asked: Asked) -> Oracle:
    """An ONNX file, run by ONNX Runtime; onnx:FILE#OUTPUT says which output holds the scores."""
    file, _, output = rest.partition("#")
    backend = OnnxBackend(Path(file).expanduser(), asked, output or None)
    return Oracle(backend, answers=asked.answers or "scores", budget=asked.budget, classes=asked.classes)


class OnnxBackend(Backend):
    """An ONNX Runtime session with one input of images, as (N, C, H, W), (N, H, W, C) or flat (N, C·H·W).

    Which of the layouts it is follows from the sizes that the file fixes; where they fit several, from this order. A
    batch of a fixed size is filled up with copies of its last image, whose outputs are dropped. Inputs are normalised
    as a Classifier's are; a file that takes uint8 gets the box mapped to 0…255 and rounded.

    Args:
        path: the file; asked: box, mean, std and kind of answers; output: the name of the output to use.
    """

    def __init__(self, path: Path, asked: Asked, output: str | None = None) -> None:
        self.path, self.name, self.bounds = path, f"onnx:{path.name}", asked.bounds
        self.mean = None if asked.mean is None else np.asarray(asked.mean, np.float32).reshape(1, -1, 1, 1)
        self.std = None if asked.std is None else np.asarray(asked.std, np.float32).reshape(1, -1, 1, 1)
        self._session = _open(path, asked.device)
        inputs = self._session.get_inputs()
        if len(inputs) != 1:
            raise ModelError(
                f"{path} takes {len(inputs)} inputs ({', '.join(item.name for item in inputs)}); "
                "a classifier takes one tensor of images"
            )
        self.input, self.type = inputs[0].name, inputs[0].type
        if self.type not in (*_FLOATS, "tensor(uint8)"):
            raise ModelError(f"{path} takes {self.type}; images are float, float16, double or uint8 tensors")
        if self.type == "tensor(uint8)" and (self.mean is not None or self.std is not None):
            raise ModelError(f"{path} takes uint8 images, which are not normalised; leave out mean and std")
        self.shape: Shape = tuple(size if isinstance(size, int) else None for size in inputs[0].shape)
        self.output = self._choose(output, asked.answers == "labels")

    def __call__(self, x: Tensor) -> Tensor:
        """Scores (N, classes), or labels where the file gives nothing else."""
        values = self._laid_out(self._normalised(x.detach().cpu().float().numpy()))
        fixed = self.shape[0]
        if fixed is None:
            return self._run(values)
        return torch.cat([self._padded(values[i : i + fixed], fixed) for i in range(0, len(values), fixed)])

    def digest(self) -> str:
        """sha256 (hex) of the file, of the data files that it names, and of box, normalisation and output."""
        settings = (
            self.bounds,
            self.output,
            *(None if v is None else v.tolist() for v in (self.mean, self.std)),
        )
        hasher = hashlib.sha256(repr(settings).encode())
        for path in (self.path, *_external(self.path)):
            with path.open("rb") as stream:
                hasher.update(hashlib.file_digest(stream, "sha256").digest())
        return hasher.hexdigest()

    def describe(self) -> dict[str, Any]:
        """The file, and who runs it where."""
        import onnxruntime

        return {
            "file": str(self.path),
            "output": self.output,
            "onnxruntime": onnxruntime.__version__,
            "provider": self._session.get_providers()[0],
        }

    def _choose(self, wanted: str | None, labels: bool) -> str:
        """The output with the scores: named, or the only one that can be."""
        outputs = self._session.get_outputs()
        names = [item.name for item in outputs]
        if wanted is not None:
            if wanted not in names:
                raise ModelError(f"{self.path} has no output {wanted!r}; it has {', '.join(names)}")
            return wanted
        scores = [item.name for item in outputs if item.type in _FLOATS and len(item.shape or ()) in (0, 2)]
        classes = [item.name for item in outputs if item.type in _WHOLE and len(item.shape or ()) in (0, 1)]
        if len(scores) > 1:
            raise ModelError(
                f"{self.path} has {len(scores)} outputs that may be the scores: {', '.join(scores)}; "
                f"say which: onnx:{self.path}#{scores[0]}"
            )
        if scores or (labels and classes):
            return str((scores or classes)[0])
        kinds = ", ".join(f"{item.name} {item.type} {item.shape}" for item in outputs)
        hint = "; its labels can be had with answers=labels" if classes else ""
        raise ModelError(f"{self.path} gives {kinds}; scores are floats (N, classes){hint}")

    def _normalised(self, x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Images in the file's unit and type."""
        for name, values in (("mean", self.mean), ("std", self.std)):
            if values is not None and values.size not in (1, x.shape[1]):
                raise ModelError(
                    f"{name} has {values.size} values for {x.shape[1]} channels; give one each, or one"
                )
        if self.type == "tensor(uint8)":
            low, high = self.bounds
            return np.rint((x - low) * (255 / (high - low))).clip(0, 255).astype(np.uint8)
        x = x if self.mean is None else x - self.mean
        x = x if self.std is None else x / self.std
        return x.astype(_FLOATS[self.type], copy=False)

    def _laid_out(self, x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Images in the layout whose sizes fit the file's."""
        n, c, h, w = x.shape
        for sizes, order in (((c, h, w), (0, 1, 2, 3)), ((h, w, c), (0, 2, 3, 1))):
            if _fits(self.shape[1:], sizes):
                return np.ascontiguousarray(x.transpose(order))
        if _fits(self.shape[1:], (c * h * w,)):
            return x.reshape(n, -1)
        wanted = ", ".join("any" if size is None else str(size) for size in self.shape[1:])
        raise ModelError(f"{self.name} takes inputs ({wanted}), which images ({c}, {h}, {w}) do not fit")

    def _padded(self, x: np.ndarray[Any, Any], size: int) -> Tensor:
        lacking = np.repeat(x[-1:], size - len(x), axis=0)
        return self._run(np.concatenate([x, lacking]))[: len(x)]

    def _run(self, x: np.ndarray[Any, Any]) -> Tensor:
        try:
            answer = self._session.run([self.output], {self.input: x})[0]
        except Exception as error:  # onnxruntime's own errors have no common base
            raise ModelError(f"{self.name} fails on inputs of shape {x.shape}: {one_line(error)}") from error
        values = np.asarray(answer)
        if values.dtype.kind not in "fiu":
            raise ModelError(
                f"{self.name}: its output {self.output} holds no numbers; name another: onnx:FILE#OUTPUT"
            )
        return torch.from_numpy(values.astype(np.int64 if values.dtype.kind in "iu" else np.float32))


def _fits(wanted: Shape, sizes: tuple[int, ...]) -> bool:
    if len(wanted) != len(sizes):
        return False
    return all(size in (None, given) for size, given in zip(wanted, sizes, strict=True))


def _open(path: Path, device: str | None) -> Any:
    """A session; every way in which a file is no model is one line."""
    if not path.is_file():
        raise ModelError(f"{path} {'is a folder' if path.is_dir() else 'does not exist'}; give onnx:FILE")
    try:
        import onnxruntime
    except ImportError:
        raise ModelError(f"{path} needs ONNX Runtime: pip install 'robust-toolkit[onnx]'") from None
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=_providers(path, device))
    except Exception as error:  # likewise
        raise ModelError(f"{path} cannot be read as an ONNX model: {one_line(error)}") from error


def _providers(path: Path, device: str | None) -> list[Any]:
    """Who runs it: CUDA in full float32 where it is there and wanted, and else the CPU."""
    import onnxruntime

    there = "CUDAExecutionProvider" in onnxruntime.get_available_providers() and torch.cuda.is_available()
    kind, _, number = (device or ("cuda" if there else "cpu")).partition(":")
    if kind == "cuda" and there:
        cuda = {"use_tf32": 0, "device_id": int(number or 0)}
        return [("CUDAExecutionProvider", cuda), "CPUExecutionProvider"]
    if kind != "cpu":
        raise ModelError(
            f"{path}: this ONNX Runtime does not run on {device}; for CUDA install onnxruntime-gpu"
        )
    return ["CPUExecutionProvider"]


def _external(path: Path) -> list[Path]:
    """The files beside it that the file names: big models keep their weights there."""
    with path.open("rb") as stream:
        head = stream.read(_HEAD)
    return sorted(
        other for other in path.parent.iterdir()
        if other != path and other.is_file() and path.stem in other.name and other.name.encode() in head
    )  # fmt: skip
