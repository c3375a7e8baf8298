"""Inputs and bytes of the operations that smoothing, images, DP, aggregation and compression use.

`moved` counts each input and each output once, also where a kernel has to read something twice (a clipped sum that
needs its rows' norms first): a fraction of the bandwidth computed from it never flatters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from robust import cuda_ops
from robust.cuda_ops import reference
from robust.cuda_ops.case import Arguments, Case

KEY = (0x9E3779B9, 0x1234ABCD)  # one word beyond 2^31, one below


def _normal(seed: int, device: torch.device, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator(device).manual_seed(seed), device=device)


def _bytes(*values: Tensor | Iterable[Tensor] | None) -> int:
    """Size of what is given, lists included."""
    total = 0
    for value in values:
        if isinstance(value, Tensor):
            total += value.numel() * value.element_size()
        elif value is not None:
            total += _bytes(*value)
    return total


def _noise(rows: int, elements: int, seed: int, device: torch.device) -> Arguments:
    identity = torch.arange(rows, device=device) * 2**31 - 5  # on both sides of 0 and of 2^32
    x = _normal(seed, device, rows, elements)
    return {"x": x, "sigma": 0.5, "identity": identity, "step": 2**32 - 2, "key": KEY, "copies": 3}


def _scores(rows: int, elements: int, seed: int, device: torch.device) -> Arguments:
    classes = min(elements, 10)
    copies = max(elements // classes, 1)
    scores = _normal(seed, device, rows * copies, classes)
    scores[::7, 0] = torch.nan
    return {"scores": scores, "counts": _counts(rows, classes, device), "copies": copies}


def _predictions(rows: int, elements: int, seed: int, device: torch.device) -> Arguments:
    generator = torch.Generator(device).manual_seed(seed)
    votes = torch.randint(-1, 1000, (rows * elements,), generator=generator, device=device)
    return {"scores": votes, "counts": _counts(rows, 1000, device), "copies": elements}


def _counts(rows: int, classes: int, device: torch.device) -> Tensor:
    return torch.arange(rows * classes, device=device).view(rows, classes)


def _images(rows: int, elements: int, seed: int, device: torch.device) -> Tensor:
    """(rows, C, H, W) of about `elements` numbers, as square as they come, in colour where that divides them."""
    channels = 3 if elements % 3 == 0 else 1
    height = math.isqrt(elements // channels)
    return _normal(seed, device, rows, channels, height, elements // channels // height)


def _blur(taps: int) -> Callable[[int, int, int, torch.device], dict[str, Any]]:
    def make(rows: int, elements: int, seed: int, device: torch.device) -> dict[str, Any]:
        x = _images(rows, elements, seed, device)
        kernels = {}
        for name, size in (("kernel_y", x.shape[2]), ("kernel_x", x.shape[3])):
            weights = torch.arange(1.0, min(taps, 2 * size - 1) + 1, device=device)  # not symmetric
            kernels[name] = weights / weights.sum()
        return {"x": x, **kernels}

    return make


def _resize(rows: int, elements: int, seed: int, device: torch.device) -> dict[str, Any]:
    x = _images(rows, elements, seed, device)
    side, size = max(x.shape[2:]), max(int(0.9 * max(x.shape[2:])), 1)
    generator = torch.Generator(device).manual_seed(seed)
    top, left = torch.randint(0, side - size + 1, (2, rows), generator=generator, device=device)
    canvas = {"out_h": side, "out_w": side, "value": 0.5}
    return {"x": x, "size": size, "top": top, "left": left, **canvas}


def _with_gradient(operation: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    """The operation and its gradient with respect to x, from that of its result."""

    def both(x: Tensor, gradient: Tensor, **arguments: Any) -> tuple[Tensor, Tensor]:
        leaf = x.detach().requires_grad_()
        out = operation(leaf, **arguments)
        return out.detach(), torch.autograd.grad(out, leaf, gradient)[0]

    return both


def _with_upstream(
    make: Callable[[int, int, int, torch.device], dict[str, Any]], canvas: bool
) -> Callable[[int, int, int, torch.device], Arguments]:
    def made(rows: int, elements: int, seed: int, device: torch.device) -> Arguments:
        arguments = make(rows, elements, seed, device)
        shape = list(arguments["x"].shape)
        if canvas:
            shape[2:] = [arguments["out_h"], arguments["out_w"]]
        return {**arguments, "gradient": _normal(seed + 1, device, *shape)}

    return made


def _grads(rows: int, elements: int, seed: int, device: torch.device) -> Tensor:
    """Gradients on both sides of the norm 1; of three rows or more, one is not finite."""
    grads = _normal(seed, device, rows, elements) / math.sqrt(elements)
    grads *= torch.linspace(0.2, 3, rows, device=device)[:, None]
    if rows > 2:
        grads[1, elements // 2] = torch.inf
    return grads


def _layers(rows: int, elements: int, seed: int, device: torch.device) -> Arguments:
    first = elements // 3
    grads = _grads(rows, elements, seed, device)
    return {"grads": [grads[:, :first].contiguous(), grads[:, first:].reshape(rows, -1, 1)]}


def _clip(known: bool) -> Callable[[int, int, int, torch.device], Arguments]:
    def make(rows: int, elements: int, seed: int, device: torch.device) -> Arguments:
        grads = _grads(rows, elements, seed, device)
        norms = torch.linalg.vector_norm(grads, dim=1) if known else None
        return {"grads": grads, "norms": norms, "max_norm": 1.0}

    return make


def _update(momentum: bool) -> Callable[[int, int, int, torch.device], Arguments]:
    def make(rows: int, elements: int, seed: int, device: torch.device) -> Arguments:
        param, summed, old = _normal(seed, device, 3, rows, elements).unbind()
        numbers = {"lr": 0.1, "momentum_factor": 0.9 if momentum else 0.0, "noise_std": 2.0}
        tensors = {"param": param, "summed": summed, "momentum": old if momentum else None}
        return {**tensors, **numbers, "batch_size": 4.0, "key": KEY, "step": 2**31 + 1, "identity": 5}

    return make


def _updates(**more: Any) -> Callable[[int, int, int, torch.device], Arguments]:
    """Updates rounded to eighths, so that coordinates hold equal values too."""

    def make(rows: int, elements: int, seed: int, device: torch.device) -> Arguments:
        updates = (_normal(seed, device, rows, elements) * 8).round_() / 8
        made = {name: value(rows, device) for name, value in more.items()}
        return {"updates": updates, **made}

    return make


def _quantise(bits: int) -> Callable[[int, int, int, torch.device], Arguments]:
    def make(rows: int, elements: int, seed: int, device: torch.device) -> Arguments:
        return {
            "x": _normal(seed, device, rows, elements),
            "bits": bits,
            "key": KEY,
            "step": 1,
            "identity": 3,
        }

    return make


def _dequantise(bits: int) -> Callable[[int, int, int, torch.device], Arguments]:
    def make(rows: int, elements: int, seed: int, device: torch.device) -> Arguments:
        x = _normal(seed, device, rows, elements)
        codes, scale = reference.quantise(x, bits, KEY, 0)
        return {"codes": codes, "scale": scale, "bits": bits, "shape": (rows, elements)}

    return make


def _sparsify(rows: int, elements: int, seed: int, device: torch.device) -> Arguments:
    """Multiples of 2^-10, whose sums are exact in float32: what is sent does not hang on rounding."""
    update, residual = ((_normal(seed, device, 2, rows, elements) * 1024).round_() / 1024).unbind()
    return {"update": update, "residual": residual, "threshold": 1.5}


def _case(
    name: str,
    make: Callable[[int, int, int, torch.device], Arguments],
    moved: Callable[[Arguments], int],
    tolerance: float = 1e-6,
    gradient: bool = False,
) -> Case:
    operation, meaning = getattr(cuda_ops, name), getattr(reference, name)
    if gradient:
        operation, meaning = _with_gradient(operation), _with_gradient(meaning)
    return Case(operation, meaning, make, moved, tolerance=tolerance)


def _canvas(a: Arguments) -> int:
    """Bytes of the images that `resize_pad` makes."""
    return int(_bytes(a["x"][:, :, :1, :1]) * a["out_h"] * a["out_w"])


def _moved_update(a: Arguments) -> int:
    return _bytes(a["param"], a["summed"], a["param"]) + 2 * _bytes(a["momentum"])


def _moved_codes(a: Arguments) -> int:
    """Bytes of x, its codes and its scales."""
    count = a["x"].numel()
    return int(_bytes(a["x"]) + count * a["bits"] / 8 + 4 * count / 1024)


def _moved_column(a: Arguments) -> int:
    return _bytes(a["updates"], a["updates"][0], a.get("weights"))


def _moved_clip(a: Arguments) -> int:
    return _bytes(a["grads"], a["grads"][0], a["grads"][:, 0])


def _moved_restored(a: Arguments) -> int:
    return _bytes(a["codes"], a["scale"]) + 4 * math.prod(a["shape"])


_TRIM = {"trim": lambda rows, device: (rows - 1) // 4}
_WEIGHTS = {"weights": lambda rows, device: torch.arange(1.0, rows + 1, device=device)}
_NOISY = 2e-6  # the angle of a normal has two roundings in float32

CASES: dict[str, Case] = {
    "noise_batch": _case(
        "noise_batch", _noise, lambda a: _bytes(a["x"]) * (1 + a["copies"]) + _bytes(a["identity"]), _NOISY
    ),
    "vote_counts": _case("vote_counts", _scores, lambda a: _bytes(a["scores"], a["counts"], a["counts"]), 0),
    "vote_counts_predictions": _case(
        "vote_counts", _predictions, lambda a: _bytes(a["scores"], a["counts"], a["counts"]), 0
    ),
    "separable_blur": _case("separable_blur", _blur(5), lambda a: 2 * _bytes(a["x"])),
    "separable_blur_wide": _case("separable_blur", _blur(15), lambda a: 2 * _bytes(a["x"])),
    "separable_blur_gradient": _case(
        "separable_blur", _with_upstream(_blur(5), False), lambda a: 4 * _bytes(a["x"]), gradient=True
    ),
    "separable_blur_wide_gradient": _case(
        "separable_blur", _with_upstream(_blur(15), False), lambda a: 4 * _bytes(a["x"]), gradient=True
    ),
    "resize_pad": _case("resize_pad", _resize, lambda a: _bytes(a["x"]) + _canvas(a)),
    "resize_pad_gradient": _case(
        "resize_pad",
        _with_upstream(_resize, True),
        lambda a: 2 * (_bytes(a["x"]) + _canvas(a)),
        gradient=True,
    ),
    "per_sample_norm": _case(
        "per_sample_norm",
        lambda rows, elements, seed, device: {"grads": _grads(rows, elements, seed, device)},
        lambda a: _bytes(a["grads"], a["grads"][:, 0]),
    ),
    "per_sample_norm_layers": _case(
        "per_sample_norm", _layers, lambda a: _bytes(a["grads"]) + 4 * len(a["grads"][0])
    ),
    "clip_accumulate": _case("clip_accumulate", _clip(False), _moved_clip),
    "clip_accumulate_known": _case("clip_accumulate", _clip(True), _moved_clip),
    "noise_update": _case("noise_update", _update(False), _moved_update, _NOISY),
    "noise_update_momentum": _case("noise_update", _update(True), _moved_update, _NOISY),
    "stacked_mean": _case("stacked_mean", _updates(), _moved_column),
    "stacked_mean_weighted": _case("stacked_mean", _updates(**_WEIGHTS), _moved_column),
    "stacked_median": _case("stacked_median", _updates(), _moved_column),
    "trimmed_mean": _case("trimmed_mean", _updates(**_TRIM), _moved_column),
    "quantise_8": _case("quantise", _quantise(8), _moved_codes, 0),
    "quantise_4": _case("quantise", _quantise(4), _moved_codes, 0),
    "dequantise_8": _case("dequantise", _dequantise(8), _moved_restored),
    "dequantise_4": _case("dequantise", _dequantise(4), _moved_restored),
    "sparsify": _case("sparsify", _sparsify, lambda a: 2 * _bytes(a["update"], a["residual"]), 0),
}
