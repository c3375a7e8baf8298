"""What a small CNN on 5,000 CIFAR-10 images gives away, plain and trained with differential privacy.

    python -m robust.experiments.privacy.membership OUT RECORD [--data imagefolder:DIR] [--shadow 64] [--private 16]

OUT keeps every model, answer and score: a killed run goes on with the same command, and nothing is trained twice.
RECORD becomes membership.json. Plain: a target on a random half of the images, reference models on halves, all trained
by `robust.stacked`. Private: the same network under DP-SGD at the epsilon that is asked for, target and references
alike, so that the attacker knows how the target was trained. They are trained on halves of more images (--private-n),
of which the first 5,000 are the ones attacked: on 2,500 images DP-SGD learns little beyond each image's own share, of
which an epsilon of 3 lets attacks see something.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from robust.attacks.privacy import get
from robust.classifier import Classifier
from robust.conditions import conditions
from robust.data import load_data
from robust.defenses.privacy import calibrate, epsilon, make_private
from robust.detection import Samples
from robust.digest import write_json
from robust.errors import RobustError
from robust.membership import Evidence, References, halves
from robust.membership_run import Question, run_membership
from robust.membership_scores import measure
from robust.part_store import PartStore
from robust.rng import derive
from robust.stacked import first_states

SEED, N, PRIVATE_N = 0, 5000, 50_000
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
WALK: Mapping[str, Any] = {
    "epochs": 30, "batch_size": 50, "lr": 2e-3, "precision": "bfloat16", "channels_last": True,
}  # fmt: skip
PRIVATE: Mapping[str, Any] = {"epochs": 4, "batch_size": 500, "lr": 2.0, "max_grad_norm": 1.0, "delta": 1e-5}
PLAIN_ATTACKS: Mapping[str, Any] = {
    "loss": get("loss")(),
    "entropy": get("entropy")(),
    "modified-entropy": get("modified-entropy")(),
    "modified-entropy by class": get("modified-entropy")(thresholds="class"),
    "confidence": get("confidence")(),
    "label-only-gap": get("label-only-gap")(),
    "shadow": get("shadow")(),
    "learned": get("learned")(),
    "lira-online": get("lira-online")(queries=2),
    "lira-offline": get("lira-offline")(queries=2),
    "rmia": get("rmia")(),
    "lira-online of 2": get("lira-online")(references=2),
    "lira-offline of 2": get("lira-offline")(references=2),
    "rmia of 2": get("rmia")(references=2),
    "rmia online of 2": get("rmia")(references=2, mode="online"),
}
PRIVATE_ATTACKS = ("loss", "lira-online", "lira-offline", "rmia", "lira-online of 2", "rmia of 2")
Say = Callable[[str], None]


def network() -> nn.Module:
    """A small CNN without batch normalisation for 32x32 images: 0.17 million parameters, 3 million multiplications."""
    return nn.Sequential(
        nn.Conv2d(3, 24, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(24, 48, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(48, 64, 3, padding=1),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * 16, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )


def build() -> Classifier:
    """The network in its box, with weights from torch's global generator."""
    return Classifier(network(), mean=MEAN, std=STD, device="cpu", name="small CNN")


def plain(
    samples: Samples, out: Path, shadows: int, walk: Mapping[str, Any], command: Sequence[str], say: Say
) -> dict[str, Any]:
    """The attacks on the plain target, see `robust.membership_run`; those that need more references are left out."""
    attacks = {name: attack for name, attack in PLAIN_ATTACKS.items() if attack.needs() <= shadows}
    question = Question(samples, attacks, build=build, shadows=shadows, walk=walk, seed=SEED)
    said = time.monotonic()

    def tell(done: float, text: str) -> None:
        nonlocal said
        if time.monotonic() - said > 20:
            said = time.monotonic()
            say(f"plain {done:4.0%} {text}")

    return run_membership(question, out=out, resume=out.exists(), command=command, progress=tell)


def privately(
    samples: Samples, inside: Tensor, key: int, walk: Mapping[str, Any], sigma: float
) -> dict[str, Tensor]:
    """The state of one model that DP-SGD trained on the samples `inside` (N,) bool."""
    clf = build()
    clf.module.load_state_dict(first_states(build, derive(SEED, "private"))(key))
    x, y = clf.normalise(samples.x[inside]), samples.y[inside]
    optimizer: torch.optim.Optimizer = torch.optim.SGD(clf.module.parameters(), walk["lr"])
    loader: DataLoader[Any] = DataLoader(TensorDataset(x, y), walk["batch_size"])
    module, private, batches = make_private(
        clf.module, optimizer, loader, noise_multiplier=sigma, max_grad_norm=walk["max_grad_norm"],
        seed=derive(SEED, "private", key),
    )  # fmt: skip
    assert batches is not None
    module.train()
    for _ in range(walk["epochs"]):
        for inputs, labels in batches:
            private.zero_grad()
            F.cross_entropy(module(inputs), labels).backward()
            private.step()
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def private(
    samples: Samples, n: int, out: Path, shadows: int, walk: Mapping[str, Any], target: float, say: Say
) -> dict[str, Any]:
    """The attacks, on the first `n` samples, on a target of this epsilon, with private reference models."""
    steps_an_epoch = -(-(len(samples.x) // 2) // walk["batch_size"])
    setting = {"sample_rate": 1 / steps_an_epoch, "steps": walk["epochs"] * steps_an_epoch}
    found = calibrate(target_epsilon=target, delta=walk["delta"], **setting)
    sigma = found.mechanism.noise_multiplier
    spent = float(epsilon(noise_multiplier=sigma, delta=walk["delta"], **setting))
    members = halves(len(samples.x), 1, derive(SEED, "private/target"))
    inside = torch.cat([members, halves(len(samples.x), shadows, derive(SEED, "private/references"))])
    attacks = {name: PLAIN_ATTACKS[name] for name in PRIVATE_ATTACKS}
    attacks = {name: attack for name, attack in attacks.items() if attack.needs() <= shadows}
    identity = {
        "data": samples.digest(), "n": n, "walk": dict(walk), "epsilon": target, "noise_multiplier": sigma,
        "shadows": shadows,
    }  # fmt: skip
    store = PartStore(out, identity, out.exists(), {}, ("models", "answers", "scores"))
    models = []
    for key, part in enumerate(inside):
        begun = time.monotonic()
        state = store.tensors(
            f"models/{key:05d}",
            lambda key=key, part=part: privately(samples, part, key, walk, sigma),  # type: ignore[misc]
        )
        say(f"private model {key + 1} of {len(inside)}, {time.monotonic() - begun:.0f} seconds")
        models.append(build())
        models[-1].module.load_state_dict(state)
        models[-1].module.eval()
    references, members = References(models[1:], inside[1:, :n]), members[0, :n]
    evidence = Evidence(models[0], samples.x[:n], samples.y[:n], references, seed=SEED, keep=store.tensors)
    rows = [
        {"name": name, **attack.config(), **measure(attack.run(evidence), members)}
        for name, attack in attacks.items()
    ]
    right = evidence.labels() == evidence.y
    return {
        "epsilon": spent, "delta": walk["delta"], "noise_multiplier": sigma, **setting, "walk": dict(walk),
        "shadows": shadows, "trained_on": int(inside[0].sum()), "attacked": n, "seconds": store.seconds(0.0),
        "attacks": rows,
        "accuracy": {
            "members": float(right[members].double().mean()), "others": float(right[~members].double().mean()),
        },
    }  # fmt: skip


def record(found: Mapping[str, Any], hidden: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept of both."""
    kept = ("samples", "accuracy", "references", "walk", "seconds", "attacks")
    return {
        **conditions(torch.device("cpu")),
        "threads": torch.get_num_threads(),
        "plain": {key: found[key] for key in kept},
        "private": dict(hidden),
    }


def main(arguments: list[str]) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m robust.experiments.privacy.membership", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("out", type=Path)
    parser.add_argument("record", type=Path)
    parser.add_argument("--data", default="cifar10")
    parser.add_argument("--data-root", type=Path)
    parser.add_argument("--n", type=int, default=N)
    parser.add_argument("--shadow", type=int, default=64)
    parser.add_argument("--private", type=int, default=16)
    parser.add_argument("--private-n", type=int, default=PRIVATE_N)
    parser.add_argument("--epsilon", type=float, default=3.0)
    parser.add_argument("--epochs", type=int, help="of both, in place of the usual ones")
    given = parser.parse_args(arguments)
    changed = {} if given.epochs is None else {"epochs": given.epochs}

    def say(line: str) -> None:
        print(line, flush=True)

    try:
        more = load_data(given.data, n=max(given.n, given.private_n), root=given.data_root, train=True)
        samples = Samples(*more.batch(range(min(given.n, len(more)))))
        found = plain(samples, given.out / "plain", given.shadow, {**WALK, **changed}, sys.argv, say)
        say(f"plain: {found['seconds']:.0f} seconds")
        hidden = private(
            Samples(*more.tensors()), len(samples.x), given.out / "private", given.private, {**PRIVATE, **changed},
            given.epsilon, say,
        )  # fmt: skip
        write_json(given.record, record(found, hidden))
    except RobustError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    for kind, part in (("plain", found), (f"epsilon {hidden['epsilon']:.2f}", hidden)):
        for row in part["attacks"]:
            rates = ", ".join(f"{100 * told['fraction']:.2f} %" for told in row["tpr"].values())
            say(
                f"{kind:14} {row['name']:26} {rates}  {row['auc']:.3f}  {'chance' if row['at_chance'] else ''}"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
