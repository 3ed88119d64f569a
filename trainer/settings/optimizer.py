"""The settings of the optimiser and of weight averaging; the class and package of each optimiser."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import field_validator

from ..core.errors import suggest
from .adapter import ROTATIONS
from .base import Settings, setting

OptimizerName = Literal[
    "adamw", "adamw-8bit", "adamw-8bit-paged", "adafactor", "lion", "prodigy", "adamw-schedule-free"
]
_GROUP = "Optimiser"
_LEAST_PRODIGY_RATE = 0.1
_OPTION_TYPES = (bool, int, float, type(None))  # and tuples of them: what JSON in a checkpoint can hold


@dataclass(frozen=True)
class OptimizerClass:
    """Where an optimiser comes from.

    Attributes:
        module: Module that defines the class; with `name`, how kohya's metadata name it.
        name: Name of the class.
        requirement: What pip must install for it; empty: nothing beyond the trainer's own requirements.
        bytes_per_number: Size of its state per trained number, in bytes, at least.
        fixed: Options that it always gets.
    """

    module: str
    name: str
    requirement: str
    bytes_per_number: float
    fixed: Mapping[str, Any] = field(default_factory=dict)


_BITSANDBYTES = "bitsandbytes>=0.45"
_PYTORCH_OPTIMIZER = "pytorch_optimizer>=3.4.2"  # before, schedule-free AdamW averaged and decayed otherwise
_ADAFACTOR = {"scale_parameter": False, "relative_step": False, "warmup_init": False}  # the rate comes from outside
OPTIMIZERS: Mapping[str, OptimizerClass] = {
    "adamw": OptimizerClass("torch.optim.adamw", "AdamW", "", 8),
    "adamw-8bit": OptimizerClass("bitsandbytes.optim.adamw", "AdamW8bit", _BITSANDBYTES, 2),
    "adamw-8bit-paged": OptimizerClass("bitsandbytes.optim.adamw", "PagedAdamW8bit", _BITSANDBYTES, 2),
    "adafactor": OptimizerClass("transformers.optimization", "Adafactor", "", 0, _ADAFACTOR),
    "lion": OptimizerClass("pytorch_optimizer.optimizer.lion", "Lion", _PYTORCH_OPTIMIZER, 4),
    "prodigy": OptimizerClass("pytorch_optimizer.optimizer.prodigy", "Prodigy", _PYTORCH_OPTIMIZER, 16),
    "adamw-schedule-free": OptimizerClass(
        "pytorch_optimizer.optimizer.schedulefree", "ScheduleFreeAdamW", _PYTORCH_OPTIMIZER, 8
    ),
}


FUSABLE = ("adamw", "adamw-8bit", "adamw-8bit-paged", "adafactor")
"""Those whose update of a parameter depends on that parameter's gradient alone, so that it can be done by itself."""


class OptimizerSettings(Settings):
    """How the weights are updated, and whether they are averaged."""

    optimizer: OptimizerName = setting(
        "adamw",
        "Optimiser. adamw: the usual choice, learning rate about 1e-4. adamw-8bit: same rates, a quarter of the "
        "memory (needs bitsandbytes); for small cards and full fine-tuning. adamw-8bit-paged: also moves that memory "
        "to system RAM when the card is full. adafactor: least memory, rates as for adamw. lion: half of adamw's "
        "memory, a third to a tenth of its rate (3e-5). prodigy: finds the rate itself (set learning_rate to 1); "
        "needs four floats per weight. adamw-schedule-free: needs no schedule, uses averaged weights, one to ten "
        "times adamw's rate.",
        group=_GROUP,
        advanced=True,
    )
    optimizer_options: str = setting(
        "",
        "Additional options for the optimiser: KEY=VALUE, separated by spaces, such as betas=(0.9,0.99) eps=1e-6 or, "
        "for prodigy, d_coef=2.",
        group=_GROUP,
        advanced=True,
    )
    lora_plus_ratio: float = setting(
        0.0,
        "LoRA+: multiplies the learning rate of the factors that start at zero (lora_up in LoRA and DoRA, hada_w2_b "
        "in LoHa, lokr_w1 in LoKr; oft and boft have none). 16 is typical; 0: off.",
        group=_GROUP,
        advanced=True,
        ge=0.0,
        le=1000.0,
    )
    ema_decay: float = setting(
        0.0,
        "Use and save an exponential moving average of the weights instead of the latest ones: less noisy, but it "
        "lags slightly. 0.999 is typical, 0.9999 for thousands of steps; the decay starts lower. 0: off.",
        group=_GROUP,
        advanced=True,
        ge=0.0,
        lt=1.0,
    )

    @field_validator("optimizer_options")
    @classmethod
    def _options_parse(cls, text: str) -> str:
        _parse_options(text)
        return text

    @property
    def optimizer_class(self) -> OptimizerClass:
        """Where the optimiser comes from."""
        return OPTIMIZERS[self.optimizer]

    @property
    def extra_options(self) -> dict[str, Any]:
        """`optimizer_options`, parsed."""
        return _parse_options(self.optimizer_options)

    @property
    def averages(self) -> bool:
        """Whether the weights that are used and saved differ from those that are updated."""
        return self.optimizer == "adamw-schedule-free" or self.ema_decay > 0

    def optimizer_title(self, weight_decay: float) -> str:
        """Class and options as kohya writes them into `ss_optimizer`."""
        optimizer = self.optimizer_class
        options = {"weight_decay": weight_decay, **optimizer.fixed, **self.extra_options}
        arguments = ",".join(f"{name}={value}" for name, value in options.items())
        return f"{optimizer.module}.{optimizer.name}({arguments})"

    def require_suitable(
        self,
        *,
        learning_rate: float,
        text_encoder_rates: Mapping[str, float],
        token_rate: float | None = None,
        lr_schedule: str,
        adapter: str,
        max_norm: float,
    ) -> None:
        """Check the settings that depend on the optimiser.

        Args:
            learning_rate: Learning rate of the UNet.
            text_encoder_rates: Text encoder → its learning rate.
            token_rate: Learning rate of the rare word's vectors, if they are trained.
            lr_schedule: Name of the learning rate schedule.
            adapter: Kind of adapter.
            max_norm: Maximum norm of a layer; 0: no limit.

        Raises:
            ValueError: Names the settings that contradict each other, and what to change.
        """
        if self.lora_plus_ratio and adapter == "full":
            raise ValueError(
                f"{suggest('lora_plus_ratio')} is for adapters, but {suggest('adapter')} is 'full': set "
                f"{suggest('lora_plus_ratio', 0)} or choose another {suggest('adapter')}"
            )
        if self.lora_plus_ratio and adapter in ROTATIONS:
            raise ValueError(
                f"{suggest('lora_plus_ratio')} needs an adapter with two factors, unlike {adapter}: set "
                f"{suggest('lora_plus_ratio', 0)}, and choose {suggest('learning_rate')}"
            )
        if self.optimizer == "prodigy":
            self._require_one_rate(learning_rate, text_encoder_rates)
            if token_rate is not None and token_rate != learning_rate:
                raise ValueError(
                    f"prodigy has one learning rate for all parameters: set {suggest('token_lr', learning_rate)}, like "
                    f"{suggest('learning_rate')}, or {suggest('token_vectors', 0)}"
                )
        if self.optimizer == "adamw-schedule-free":
            self._require_no_schedule(lr_schedule, max_norm)

    def _require_one_rate(self, learning_rate: float, text_encoder_rates: Mapping[str, float]) -> None:
        """Prodigy estimates one distance for all parameters; learning rates are factors of it, and must be equal."""
        if learning_rate < _LEAST_PRODIGY_RATE:
            raise ValueError(
                f"prodigy finds the learning rate itself and {suggest('learning_rate')} only scales it, but it is "
                f"{learning_rate:g}: set {suggest('learning_rate', 1)} (and for a lower one, d_coef=0.5 in "
                f"{suggest('optimizer_options')})"
            )
        for component, rate in text_encoder_rates.items():
            if rate != learning_rate:
                name = f"{component}_lr"
                raise ValueError(
                    f"prodigy has one learning rate for all parameters: set {suggest(name, learning_rate)}, "
                    f"like {suggest('learning_rate')}, or {suggest(name, 0)}"
                )
        if self.lora_plus_ratio:
            raise ValueError(f"prodigy has one learning rate for all parameters: set {suggest('lora_plus_ratio', 0)}")

    def _require_no_schedule(self, lr_schedule: str, max_norm: float) -> None:
        """Schedule-free AdamW has no schedule, averages the weights itself, and recomputes them at every step."""
        if lr_schedule not in ("constant", "constant_with_warmup"):
            raise ValueError(
                f"adamw-schedule-free replaces the schedule, but {suggest('lr_schedule')} is '{lr_schedule}': "
                "choose constant or constant_with_warmup"
            )
        if self.ema_decay:
            raise ValueError(f"adamw-schedule-free averages the weights itself: set {suggest('ema_decay', 0)}")
        if max_norm:
            raise ValueError(
                f"{suggest('max_norm')} limits weights that adamw-schedule-free recomputes at every step: set "
                f"{suggest('max_norm', 0)} or choose another {suggest('optimizer')}"
            )


def _parse_options(text: str) -> dict[str, Any]:
    """`KEY=VALUE` pairs; a value may have spaces inside."""
    options: dict[str, Any] = {}
    entries = re.split(r"\s+(?=[A-Za-z_]\w*=)", text.strip()) if text.strip() else []
    for entry in entries:
        match = re.fullmatch(r"([A-Za-z_]\w*)=(.+)", entry, re.DOTALL)
        if not match:
            raise ValueError(f"'{entry}' is not KEY=VALUE, such as betas=(0.9,0.99)")
        key = match[1]
        literal = match[2].strip()
        if key in options:
            raise ValueError(f"'{key}' is given twice; remove one")
        try:
            value = ast.literal_eval(literal)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            raise ValueError(f"'{literal}' of '{key}' is not a number, True, False, None or (a,b)") from None
        parts = value if isinstance(value, tuple) else (value,)
        if not all(isinstance(part, _OPTION_TYPES) for part in parts):
            raise ValueError(f"'{literal}' of '{key}' is not a number, True, False, None or (a,b)")
        options[key] = value
    return options
