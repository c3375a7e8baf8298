"""Which models can be trained privately, parameter by parameter, and the mending of those that cannot."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.utils.parametrize import is_parametrized
from torch.optim import LBFGS, Optimizer

from robust.defenses.privacy.gradients.engine import rule_of
from robust.errors import ConfigError, ModelError, first_line

_FUSED = (nn.RNNBase, nn.MultiheadAttention)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that require gradients, by name, each once."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def problems(model: nn.Module) -> Iterator[str]:
    """What keeps a model from private training: one line each, with the parameter's name and what would be right."""
    for name, module in model.named_modules():
        where = name or type(module).__name__
        own = [key for key, p in module._parameters.items() if p is not None and p.requires_grad]
        first = f"{name}.{own[0]}" if name and own else own[0] if own else ""
        if isinstance(module, _BatchNorm) and (own or module.training):
            yield (
                f"{first or where} belongs to a {type(module).__name__}, which mixes the samples of a batch; "
                "use robust.defenses.privacy.fix(model), or the model groupnorm:MODEL (robust train --dp-fix), which "
                "put GroupNorm in its place"
            )
        elif isinstance(module, _InstanceNorm) and module.track_running_stats:
            yield (
                f"{where} keeps running statistics of the samples without noise; build it with "
                "track_running_stats=False"
            )
        elif own and is_parametrized(module):
            yield (
                f"{where} is parametrized, so that its weights have no per-sample gradient; remove the "
                "parametrization"
            )
        elif own and isinstance(module, _FUSED):
            yield (
                f"{first} belongs to a {type(module).__name__}, whose kernel gives no per-sample gradient; use "
                "robust.defenses.privacy.fix(model) and engine='opacus'"
            )
        elif own:
            rule = rule_of(module)
            reason = rule.refuses(module) if rule is not None else None
            if reason is not None:
                yield f"{first} has no per-sample gradient: {reason}"


def check(model: nn.Module, optimizer: Optimizer) -> dict[str, nn.Parameter]:
    """The trainable parameters by name, if optimizer and model agree on them.

    Frozen parameters in the optimizer stay as they are. A tied parameter counts once; its gradient is that of all its
    uses.

    Raises:
        ModelError: a parameter has no per-sample gradient.
        ConfigError: a trainable parameter is not in the optimizer, or one in the optimizer is not the model's.
    """
    if isinstance(optimizer, LBFGS):
        raise ConfigError(
            "LBFGS looks at the gradient several times a step, and each look costs privacy; take another"
        )
    line = next(problems(model), None)
    if line is not None:
        raise ModelError(line)
    named = trainable(model)
    if not named:
        raise ModelError("no parameter of this model requires a gradient; there is nothing to train")
    held = {id(p): p for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in named.items():
        if id(parameter) not in held:
            raise ConfigError(
                f"parameter {name} is trainable, but not in the optimizer; freeze it by requires_grad_(False) or add it"
            )
    known = {id(p) for p in model.parameters()}
    for p in held.values():
        if id(p) not in known:
            raise ConfigError(
                f"the optimizer has a parameter {tuple(p.shape)} that is not the model's; leave it out"
            )
    return named


def fix(model: nn.Module) -> nn.Module:
    """A copy of a model that can be trained privately: what mixes samples is replaced.

    Batch normalisations become group normalisations with at most 32 groups, and running statistics go. Recurrent layers
    and attention become opacus's layers, for `engine="opacus"`, if it is installed. New layers have new weights; make
    the optimizer afterwards.

    Raises:
        ModelError: opacus is needed and absent.
    """
    fixed = _replaced(copy.deepcopy(model))
    if any(isinstance(module, _FUSED) for module in fixed.modules()):
        try:
            from opacus.layers import DPRNN
            from opacus.validators import ModuleValidator

            fixed = _elman(ModuleValidator.fix(fixed), DPRNN)
        except ImportError as error:
            raise ModelError(
                f"recurrent layers and attention are replaced by opacus's, which is not there ({first_line(error)}); "
                "pip install 'robust-toolkit[privacy]'"
            ) from None
    return fixed


def _replaced(module: nn.Module) -> nn.Module:
    if isinstance(module, _BatchNorm):
        channels: Any = module.num_features
        norm = nn.GroupNorm(math.gcd(32, channels), channels, module.eps, affine=module.affine)
        like = next(iter([*module.parameters(), *module.buffers()]), None)
        norm.train(module.training)
        return (
            norm if like is None else norm.to(like.device, like.dtype if like.is_floating_point() else None)
        )
    if isinstance(module, _InstanceNorm) and module.track_running_stats:
        module.track_running_stats = False
        module.running_mean = module.running_var = module.num_batches_tracked = None
        return module
    for name, child in module.named_children():
        setattr(module, name, _replaced(child))
    return module


def _elman(module: nn.Module, kind: Any) -> nn.Module:
    """opacus's validator leaves plain recurrent layers as they are; its layer for them has the same parameters."""
    if isinstance(module, nn.RNN):
        sizes = (module.input_size, module.hidden_size, module.num_layers, module.bias, module.batch_first)
        more = {"bidirectional": module.bidirectional, "nonlinearity": module.nonlinearity}
        made: nn.Module = kind(*sizes, module.dropout, **more)
        made.load_state_dict(module.state_dict())
        return made
    for name, child in module.named_children():
        setattr(module, name, _elman(child, kind))
    return module
