"""The settings of the optimiser and of the averaging of what it learns; which class of which package each one is."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import field_validator
from typing_extensions import Self

from .base import Settings, setting

OptimizerName = Literal[
    "adamw", "adamw-8bit", "adamw-8bit-paged", "adafactor", "lion", "prodigy", "adamw-schedule-free"
]
_GROUP = "Optimiser"
_LEAST_PRODIGY_RATE = 0.1
_VALUES = (bool, int, float, type(None))  # and tuples of them: what a checkpoint's JSON can keep


@dataclass(frozen=True)
class OptimizerClass:
    """Where an optimiser comes from.

    Attributes:
        module: Module that defines the class; with `name` what kohya's metadata call it.
        name: Of the class.
        requirement: What pip installs for it; empty: nothing beyond what the trainer needs anyway.
        bytes_per_number: What it keeps of every trained number, at the least.
        fixed: Options that are always given to it.
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


class OptimizerSettings(Settings):
    """By what rule the weights are updated, and which weights are shown."""

    optimizer: OptimizerName = setting(
        "adamw",
        "Optimiser. adamw: the usual one, rate about 1e-4. adamw-8bit: the same with a quarter of its memory, same "
        "rates (bitsandbytes); what a small card or full fine-tuning needs. adamw-8bit-paged: lets CUDA move that to "
        "the computer's memory when the card is full, too. adafactor: the least memory, rates as for adamw. lion: half "
        "of adamw's memory, a third to a tenth of its rate (3e-5). prodigy: finds the rate itself, set learning_rate "
        "to 1; four floats per weight. adamw-schedule-free: no schedule to choose, shows an average of its weights, "
        "one to ten times adamw's rate.",
        group=_GROUP,
        advanced=True,
    )
    optimizer_options: str = setting(
        "",
        "Further options of the optimiser: KEY=VALUE, separated by blanks, such as betas=(0.9,0.99) eps=1e-6 or, for "
        "prodigy, d_coef=2.",
        group=_GROUP,
        advanced=True,
    )
    lora_plus_ratio: float = setting(
        0.0,
        "LoRA+: the parts of an adapter that start at zero (of LoRA and DoRA lora_up, of LoHa hada_w2_b, of LoKr "
        "lokr_w1) learn so many times as fast as the others; 16 is usual. 0: all learn alike.",
        group=_GROUP,
        advanced=True,
        ge=0.0,
        le=1000.0,
    )
    ema_decay: float = setting(
        0.0,
        "Show and save an exponential moving average of the weights instead of the last ones: less noise, a little "
        "later. 0.999 is usual, 0.9999 for thousands of steps; it begins lower. 0: off.",
        group=_GROUP,
        advanced=True,
        ge=0.0,
        lt=1.0,
    )

    @field_validator("optimizer_options")
    @classmethod
    def _options_are_read(cls, text: str) -> str:
        _options(text)
        return text

    @property
    def optimizer_class(self) -> OptimizerClass:
        """Where the optimiser comes from."""
        return OPTIMIZERS[self.optimizer]

    @property
    def further_options(self) -> dict[str, Any]:
        """`optimizer_options`, read."""
        return _options(self.optimizer_options)

    @property
    def averages(self) -> bool:
        """Whether the weights that are shown and saved are others than those that are updated."""
        return self.optimizer == "adamw-schedule-free" or self.ema_decay > 0

    def optimizer_title(self, weight_decay: float) -> str:
        """Class and options as kohya writes them into `ss_optimizer`."""
        found = self.optimizer_class
        options = {"weight_decay": weight_decay, **found.fixed, **self.further_options}
        return f"{found.module}.{found.name}({','.join(f'{name}={value}' for name, value in options.items())})"

    def require_fitting(
        self, rate: float, text_rates: Mapping[str, float], schedule: str, adapter: str, max_norm: float
    ) -> Self:
        """Check the settings that must go together with the optimiser.

        Args:
            rate: Learning rate of the UNet.
            text_rates: Text encoder → its learning rate.
            schedule: Name of the learning rate's schedule.
            adapter: Kind of adapter.
            max_norm: Limit of a layer's norm; 0: none.

        Raises:
            ValueError: Says what contradicts what, and what to change.
        """
        if self.lora_plus_ratio and adapter == "full":
            raise ValueError(
                "lora_plus_ratio is for adapters, but adapter is 'full': set it to 0 or choose another adapter"
            )
        if self.optimizer == "prodigy":
            self._require_one_rate(rate, text_rates)
        if self.optimizer == "adamw-schedule-free":
            if schedule not in ("constant", "constant_with_warmup"):
                raise ValueError(
                    f"adamw-schedule-free replaces the schedule, but lr_schedule is '{schedule}': "
                    "choose constant or constant_with_warmup"
                )
            if self.ema_decay:
                raise ValueError("adamw-schedule-free averages the weights itself: set ema_decay to 0")
            if max_norm:
                raise ValueError(
                    "max_norm limits weights that adamw-schedule-free computes anew in every step: set max_norm to 0 "
                    "or choose another optimizer"
                )
        return self

    def _require_one_rate(self, rate: float, text_rates: Mapping[str, float]) -> None:
        """Prodigy estimates one distance for all parameters; rates are factors of it, and must be equal."""
        if rate < _LEAST_PRODIGY_RATE:
            raise ValueError(
                f"prodigy finds the learning rate itself and learning_rate is a factor of it, but it is {rate:g}: set "
                "learning_rate to 1 (and for less, d_coef=0.5 in optimizer_options)"
            )
        for name, other in text_rates.items():
            if other != rate:
                raise ValueError(
                    f"prodigy has one rate for all that is trained: set {name}_lr to {rate:g}, like learning_rate, "
                    "or to 0"
                )
        if self.lora_plus_ratio:
            raise ValueError("prodigy has one rate for all that is trained: set lora_plus_ratio to 0")


def _options(text: str) -> dict[str, Any]:
    """`KEY=VALUE` pairs, read; a value may have blanks inside."""
    found: dict[str, Any] = {}
    for entry in re.split(r"\s+(?=[A-Za-z_]\w*=)", text.strip()) if text.strip() else []:
        match = re.fullmatch(r"([A-Za-z_]\w*)=(.+)", entry, re.DOTALL)
        if not match:
            raise ValueError(f"'{entry}' is not KEY=VALUE, such as betas=(0.9,0.99)")
        key, written = match[1], match[2].strip()
        if key in found:
            raise ValueError(f"'{key}' is given twice; leave one")
        try:
            value = ast.literal_eval(written)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            raise ValueError(f"'{written}' of '{key}' is no number, True, False, None or (a,b)") from None
        if not all(isinstance(one, _VALUES) for one in (value if isinstance(value, tuple) else (value,))):
            raise ValueError(f"'{written}' of '{key}' is no number, True, False, None or (a,b)")
        found[key] = value
    return found
