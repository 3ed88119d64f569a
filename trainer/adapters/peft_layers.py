"""The types of adapters that can be trained: their PEFT layers, and their parameters by their names in a file.

A type is one entry of `PEFT_METHODS`; nothing else in training depends on the type.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .layers import DORA_SCALE
from .orthogonal import OrthogonalProduct, orthogonal_start

PEFT_ADAPTER_NAME = "subject"


@dataclass(frozen=True)
class AdapterConfig:
    """What PEFT's layers are made from.

    Attributes:
        targets: Regular expression that matches the modules' whole paths.
        rank: Rank of all of them; of OFT and BOFT the size of a block.
        dropout: Share of the inputs that is dropped; LoRA and DoRA only.
        factor: LoKr's smaller factor; -1: as even as possible.
    """

    targets: str
    rank: int
    dropout: float = 0.0
    factor: int = -1


def _uniform(suffix: str, shape: torch.Size, module: nn.Module, source: torch.Generator) -> Tensor:
    """Within ±1/√fan_in, as PEFT does (Kaiming with a = √5)."""
    bound = 1 / math.sqrt(shape[1:].numel())
    return torch.empty(shape).uniform_(-bound, bound, generator=source)


@dataclass(frozen=True)
class PeftMethod:
    """One type of adapter.

    Attributes:
        title: Its name in `Layer.kind`.
        inject: Puts the layers into a network.
        parameters: A layer of PEFT's kind → its parameters by suffix, the part of a file's key after the module's
            name.
        zero_initialized: Suffixes of the parameters that start at zero, so that the adapter initially has no effect.
        squared_norm: Parameters by suffix → squared Frobenius norm of the unscaled delta, 0-D; of a rotation of the
            weight, whose delta depends on the weight, that of the generator Q.
        prepare: Changes a layer that was injected before its parameters are looked up.
        initial: Such a layer → the initial values of its parameters, by suffix, where the delta is the difference.
        draw: Returns the initial value of a parameter that does not start at zero: its suffix, its shape, the module
            that gets the adapter, and the source of the random numbers → float32 on the CPU.
    """

    title: str
    inject: Callable[[nn.Module, AdapterConfig], None]
    parameters: Callable[[Any], dict[str, nn.Parameter]]
    zero_initialized: frozenset[str]
    squared_norm: Callable[[Mapping[str, Tensor]], Tensor]
    prepare: Callable[[Any], None] = lambda module: None
    initial: Callable[[Any], dict[str, Tensor]] = lambda module: {}
    draw: Callable[[str, torch.Size, nn.Module, torch.Generator], Tensor] = _uniform


def _inject(network: nn.Module, config: Any) -> None:
    """Let PEFT put the layers of its configuration into a network."""
    from peft import inject_adapter_in_model

    inject_adapter_in_model(config, network, adapter_name=PEFT_ADAPTER_NAME)


def _inject_lora(network: nn.Module, config: AdapterConfig, *, dora: bool = False) -> None:
    from peft import LoraConfig

    peft_config = LoraConfig(
        r=config.rank,
        lora_alpha=config.rank,
        target_modules=config.targets,
        lora_dropout=config.dropout,
        use_dora=dora,
    )
    _inject(network, peft_config)


def _inject_dora(network: nn.Module, config: AdapterConfig) -> None:
    _inject_lora(network, config, dora=True)


def _lora_parameters(module: Any) -> dict[str, nn.Parameter]:
    parameters = {
        "lora_down.weight": module.lora_A[PEFT_ADAPTER_NAME].weight,
        "lora_up.weight": module.lora_B[PEFT_ADAPTER_NAME].weight,
    }
    if PEFT_ADAPTER_NAME in module.lora_magnitude_vector:
        parameters[DORA_SCALE] = module.lora_magnitude_vector[PEFT_ADAPTER_NAME].weight
    return parameters


def _lora_squared_norm(parameters: Mapping[str, Tensor]) -> Tensor:
    """‖up · down‖² from the two Gram matrices, without the product."""
    down = parameters["lora_down.weight"].flatten(1)
    up = parameters["lora_up.weight"].flatten(1)
    squared: Tensor = ((up.T @ up) * (down @ down.T)).sum()
    return squared.clamp(min=0)


def _make_orthogonal(module: Any) -> None:
    """Put the product of both factors, less what it is at the start, where the first factor was."""
    product = OrthogonalProduct(module.lora_A[PEFT_ADAPTER_NAME], module.lora_B[PEFT_ADAPTER_NAME])
    module.lora_A[PEFT_ADAPTER_NAME] = product
    module.lora_B[PEFT_ADAPTER_NAME] = nn.Identity()


def _orthogonal_parameters(module: Any) -> dict[str, nn.Parameter]:
    parameters: dict[str, nn.Parameter] = module.lora_A[PEFT_ADAPTER_NAME].trained()
    return parameters


def _orthogonal_initial(module: Any) -> dict[str, Tensor]:
    initial: dict[str, Tensor] = module.lora_A[PEFT_ADAPTER_NAME].initial()
    return initial


def _inject_loha(network: nn.Module, config: AdapterConfig) -> None:
    from peft import LoHaConfig

    _inject(network, LoHaConfig(r=config.rank, alpha=config.rank, target_modules=config.targets))


def _inject_lokr(network: nn.Module, config: AdapterConfig) -> None:
    from peft import LoKrConfig

    peft_config = LoKrConfig(
        r=config.rank, alpha=config.rank, target_modules=config.targets, decompose_factor=config.factor
    )
    _inject(network, peft_config)


def _inject_oft(network: nn.Module, config: AdapterConfig, *, butterfly: bool = False) -> None:
    from .peft_oft import inject_oft

    inject_oft(network, PEFT_ADAPTER_NAME, config.targets, config.rank, butterfly=butterfly)


def _inject_boft(network: nn.Module, config: AdapterConfig) -> None:
    _inject_oft(network, config, butterfly=True)


def _lycoris_parameters(module: Any) -> dict[str, nn.Parameter]:
    """PEFT's names, and those of OFT's layers, are LyCORIS's."""
    by_adapter = {suffix: getattr(module, suffix) for suffix in module.adapter_layer_names}
    return {
        suffix: parameters[PEFT_ADAPTER_NAME]
        for suffix, parameters in by_adapter.items()
        if PEFT_ADAPTER_NAME in parameters
    }


def _loha_squared_norm(parameters: Mapping[str, Tensor]) -> Tensor:
    first = parameters["hada_w1_a"] @ parameters["hada_w1_b"]
    second = parameters["hada_w2_a"] @ parameters["hada_w2_b"]
    squared: Tensor = (first * second).square().sum()
    return squared


def _lokr_squared_norm(parameters: Mapping[str, Tensor]) -> Tensor:
    """A Kronecker product's norm is the product of the norms."""
    squares: list[Tensor] = []
    for side in ("lokr_w1", "lokr_w2"):
        factor = parameters[side] if side in parameters else parameters[f"{side}_a"] @ parameters[f"{side}_b"]
        squares.append(factor.square().sum())
    return squares[0] * squares[1]


def _generator_squared_norm(parameters: Mapping[str, Tensor]) -> Tensor:
    """‖Q‖² over all blocks, which LyCORIS's constraint limits; ‖R − 1‖ is at most 2 ‖Q‖."""
    blocks = parameters["oft_blocks"]
    squared: Tensor = (blocks - blocks.transpose(-1, -2)).square().sum()
    return squared


PEFT_METHODS: Mapping[str, PeftMethod] = {
    "lora": PeftMethod(
        title="LoRA",
        inject=_inject_lora,
        parameters=_lora_parameters,
        zero_initialized=frozenset({"lora_up.weight"}),
        squared_norm=_lora_squared_norm,
    ),
    "dora": PeftMethod(
        title="DoRA",
        inject=_inject_dora,
        parameters=_lora_parameters,
        zero_initialized=frozenset({"lora_up.weight"}),
        squared_norm=_lora_squared_norm,
    ),
    "loha": PeftMethod(
        title="LoHa",
        inject=_inject_loha,
        parameters=_lycoris_parameters,
        zero_initialized=frozenset({"hada_w2_b"}),
        squared_norm=_loha_squared_norm,
    ),
    "lokr": PeftMethod(
        title="LoKr",
        inject=_inject_lokr,
        parameters=_lycoris_parameters,
        zero_initialized=frozenset({"lokr_w1", "lokr_w1_a"}),
        squared_norm=_lokr_squared_norm,
    ),
    "oft": PeftMethod(
        title="OFT",
        inject=_inject_oft,
        parameters=_lycoris_parameters,
        zero_initialized=frozenset({"oft_blocks"}),
        squared_norm=_generator_squared_norm,
    ),
    "boft": PeftMethod(
        title="BOFT",
        inject=_inject_boft,
        parameters=_lycoris_parameters,
        zero_initialized=frozenset({"oft_blocks"}),
        squared_norm=_generator_squared_norm,
    ),
}


ORTHOGONAL_LORA = PeftMethod(
    title="LoRA",
    inject=_inject_lora,
    parameters=_orthogonal_parameters,
    zero_initialized=frozenset(),
    squared_norm=_lora_squared_norm,
    prepare=_make_orthogonal,
    initial=_orthogonal_initial,
    draw=orthogonal_start,
)
"""A LoRA with the setting lora_init 'orthogonal'; in its file it is an ordinary one."""


def first_factors(module: Any) -> list[nn.Module]:
    """The layers of a LoRA that compute its components from a module's inputs."""
    down = module.lora_A[PEFT_ADAPTER_NAME]
    return [down.down, down.initial_down] if isinstance(down, OrthogonalProduct) else [down]


@contextlib.contextmanager
def adapters_off(modules: Iterable[Any]) -> Iterator[None]:
    """Make PEFT's layers compute the same as the modules that they wrap.

    PEFT's own `enable_adapters` would also turn the gradients of the parameters off and on.
    """
    changed = [module for module in modules if not module._disable_adapters]
    for module in changed:
        module._disable_adapters = True
    try:
        yield
    finally:
        for module in changed:
            module._disable_adapters = False


def initial_values(
    method: PeftMethod, suffix: str, shape: torch.Size, module: nn.Module, generator: torch.Generator
) -> Tensor:
    """The initial value of a parameter, float32 on the CPU.

    Zero, or the method's random values, or for DoRA's magnitudes the norms of the rows of the module's weight.

    Args:
        method: The kind of the adapter.
        suffix: Which of its parameters.
        shape: The parameter's.
        module: The module that gets the adapter, before it does.
        generator: Of the random numbers, on the CPU.
    """
    if suffix == DORA_SCALE:
        weight: Any = module.weight
        norms: Tensor = torch.linalg.vector_norm(weight.detach().float().flatten(1), dim=1)
        return norms.cpu().reshape(shape)
    if suffix in method.zero_initialized:
        return torch.zeros(shape)
    return method.draw(suffix, shape, module, generator)
