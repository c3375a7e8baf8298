"""The model zoo: architectures by name, and the weights that the project trained and ships.

`zoo:NAME` of `robust.load_model` takes a name of `ENTRIES`, which comes with its weights, or of `ARCHITECTURES`, which
needs weights from a file.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from robust.errors import ModelError
from robust.registry import Registry

ARCHITECTURES = {
    "convnet": "robust.zoo.convnet:convnet",
    "convnet-grey": "robust.zoo.convnet:convnet_grey",
    "digits": "robust.zoo.digits:DigitsNet",
    "lenet-relu": "robust.zoo.leaky:lenet_relu",
    "lenet-sigmoid": "robust.zoo.leaky:lenet_sigmoid",
    "lenet5": "robust.zoo.lenet5:LeNet5",
    "resnet20": "robust.zoo.resnet_cifar:resnet20",
    "resnet20x2": "robust.zoo.resnet_cifar:resnet20x2",
    "resnet32": "robust.zoo.resnet_cifar:resnet32",
    "resnet44": "robust.zoo.resnet_cifar:resnet44",
    "resnet56": "robust.zoo.resnet_cifar:resnet56",
    "resnet110": "robust.zoo.resnet_cifar:resnet110",
    "tanh-cifar10": "robust.zoo.tanhnet:tanh_cifar10",
    "tanh-mnist": "robust.zoo.tanhnet:tanh_mnist",
}
REGISTRY = Registry("model", ARCHITECTURES)
get = REGISTRY.load

WEIGHTS = Path(__file__).resolve().parent / "weights"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A trained model that is shipped.

    Attributes:
        architecture: a name of `ARCHITECTURES`.
        weights: file name in the folder `weights` beside this module.
        data: what it was trained on, as `load_data` names it.
        recipe: the configuration that trained it, from the repository's root.
        card: one line on what it is.
        mean: what is subtracted from the input first, one number or one per channel.
        std: what the input is divided by then.
    """

    architecture: str
    weights: str
    data: str
    recipe: str
    card: str
    mean: float | tuple[float, ...] | None = None
    std: float | tuple[float, ...] | None = None

    @property
    def path(self) -> Path:
        """The weights' file; a `ModelError` says how to make it where it is absent."""
        path = WEIGHTS / self.weights
        if not path.is_file():
            raise ModelError(
                f"the zoo's weights {path} are absent; reinstall robust-toolkit, or train them with {self.recipe}"
            )
        return path


ENTRIES = {
    "digits": Entry(
        architecture="digits",
        weights="digits.safetensors",
        data="digits",
        recipe="experiments/train/digits.toml",
        card="Standard training on scikit-learn's digits: undefended, the embedded default",
    ),
    "digits-at": Entry(
        architecture="digits",
        weights="digits-at.safetensors",
        data="digits",
        recipe="experiments/train/digits-at.toml",
        card="PGD adversarial training (Madry et al. 2018) on scikit-learn's digits, linf 0.2",
    ),
    "cifar10-convnet": Entry(
        architecture="convnet",
        weights="cifar10-convnet.safetensors",
        data="cifar10",
        recipe="experiments/train/cifar10-convnet.toml",
        card="Standard training on CIFAR-10: undefended, a source and target of transferred perturbations",
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
    ),
    "cifar10-gaussian": Entry(
        architecture="resnet20",
        weights="cifar10-gaussian.safetensors",
        data="cifar10",
        recipe="experiments/train/cifar10-gaussian.toml",
        card="Training under Gaussian noise of sigma 0.25 (Cohen et al. 2019) on CIFAR-10, for randomised smoothing",
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
    ),
    "mnist-at": Entry(
        architecture="lenet5",
        weights="mnist-at.safetensors",
        data="mnist",
        recipe="experiments/train/mnist-at.toml",
        card="PGD adversarial training (Madry et al. 2018) on MNIST, linf 0.3",
    ),
    "mnist-dp": Entry(
        architecture="tanh-mnist",
        weights="mnist-dp.safetensors",
        data="mnist",
        recipe="experiments/train/mnist-dp.toml",
        card="Private training (DP-SGD, Abadi et al. 2016) on MNIST: epsilon 3, delta 1e-5, add or remove one",
        mean=0.1307,
        std=0.3081,
    ),
}
