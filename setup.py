"""The package mapping: the folders of the checkout are one import package, `robust`; the rest is in pyproject.toml."""

from setuptools import find_packages, setup

ROOMS = ("attacks", "cuda_ops", "defenses", "experiments", "federated")
FOLDERS = {"robust": "robust"} | {f"robust.{room}": room for room in ROOMS}

setup(
    package_dir=FOLDERS,
    packages=[
        name
        for package, folder in FOLDERS.items()
        for name in (package, *(f"{package}.{child}" for child in find_packages(folder)))
    ],
)
