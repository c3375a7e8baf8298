"""NumPy archives: images and labels as arrays."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robust.data.base import ArrayImages, Data, Request, check_labels
from robust.data.fetch import one_line
from robust.errors import DataError

IMAGE_KEYS = ("x", "images")
LABEL_KEYS = ("y", "labels")
KEYS = (*IMAGE_KEYS, *LABEL_KEYS, "layout", "classes")
CHANNELS = (1, 2, 3, 4)
EXPECTED = "expected arrays x (or images) and y (or labels)"


def npz(request: Request) -> Data:
    """A NumPy archive with arrays x (uint8, or floating point in [0, 1]) and y (labels), never a pickle.

    x is (N, C, H, W) or (N, H, W, C), whichever has 1 to 4 channels, or (N, H, W) for one channel. Where both or
    neither reading fits, an array `layout` holding "NCHW" or "NHWC" decides. An array `classes` names the classes.
    """
    path = Path(request.source).expanduser()
    arrays = _read(path)
    x = next((arrays[key] for key in IMAGE_KEYS if key in arrays), None)
    y = next((arrays[key] for key in LABEL_KEYS if key in arrays), None)
    if x is None or y is None:
        raise DataError(f"{path} has of these only {', '.join(arrays) or 'none'}; {EXPECTED}")
    names = np.atleast_1d(arrays["classes"]) if "classes" in arrays else None
    labels = check_labels(y, f"{path} array y", None if names is None else len(names))
    images = _images(x, str(arrays["layout"]) if "layout" in arrays else None, path)
    if len(images) != len(labels):
        raise DataError(f"{path} holds {len(images)} images and {len(labels)} labels")
    if not len(labels):
        raise DataError(f"{path} holds no images")
    classes = range(int(labels.max()) + 1) if names is None else names.tolist()
    return Data(f"npz:{path.name}", tuple(str(name) for name in classes), ArrayImages(images), labels)


def _read(path: Path) -> dict[str, NDArray[Any]]:
    try:
        with path.open("rb") as stream:
            loaded = np.load(stream, allow_pickle=False)
            if not isinstance(loaded, np.lib.npyio.NpzFile):
                raise DataError(
                    f"{path} is one array, not an archive; {EXPECTED}, as numpy.savez writes them"
                )
            return {key: loaded[key] for key in loaded.files if key in KEYS}
    except FileNotFoundError:
        raise DataError(f"{path} does not exist") from None
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path} is not a NumPy archive of plain arrays: {one_line(error)}") from None


def _images(x: NDArray[Any], layout: str | None, path: Path) -> NDArray[Any]:
    """(N, C, H, W), uint8 as it came or float32, its range checked."""
    if x.ndim == 3:
        x, layout = x[:, None], "NCHW"
    if x.ndim != 4 or 0 in x.shape[1:]:
        raise DataError(
            f"{path} array x has shape {x.shape}; expected (N, C, H, W), (N, H, W, C) or (N, H, W)"
        )
    layout = layout or _layout(x.shape, path)
    if layout not in ("NCHW", "NHWC"):
        raise DataError(f"{path} array layout is {layout!r}; expected 'NCHW' or 'NHWC'")
    if x.dtype != np.uint8:
        _check_range(x, path)
        x = x.astype(np.float32)
    return x if layout == "NCHW" else x.transpose(0, 3, 1, 2)


def _layout(shape: tuple[int, ...], path: Path) -> str:
    """Where the channels are, if the shape can tell."""
    first, last = shape[1] in CHANNELS, shape[3] in CHANNELS
    if first == last:
        raise DataError(
            f"{path} array x of shape {shape} may be (N, C, H, W) or (N, H, W, C); "
            "add an array layout holding 'NCHW' or 'NHWC'"
        )
    return "NCHW" if first else "NHWC"


def _check_range(x: NDArray[Any], path: Path) -> None:
    if x.dtype.kind != "f":
        raise DataError(f"{path} array x is {x.dtype}; expected uint8, or floating point in [0, 1]")
    if len(x) and not (np.isfinite(x).all() and x.min() >= 0 and x.max() <= 1):
        raise DataError(
            f"{path} array x ranges from {x.min():g} to {x.max():g}; expected [0, 1], or uint8 for 0 to 255"
        )
