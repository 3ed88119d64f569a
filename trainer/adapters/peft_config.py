"""PEFT's configuration of an adapter: the options that affect its delta, and those that can't be read.

It is in adapter_config.json next to the tensors or, from diffusers, for each network in the file's metadata.
Source: peft/tuners/lora/config.py, loha/config.py and lokr/config.py of PEFT 0.13 to 0.21.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter

from ..core.errors import AdapterError
from ..core.json_data import OBJECT, checked_shape, parse_json
from .prefixes import component_of_folder

logger = logging.getLogger("dreambooth_lora")

HEADER_KEY = "lora_adapter_metadata"  # of a file's metadata, where diffusers puts the configurations of its networks
CONFIG_KEYS = (HEADER_KEY, "peft_config")  # the latter up to version 0.4
PEFT_PREFIX = "base_model.model."  # of the names of tensors in PEFT's files

_DEFAULT_ALPHA = 8.0  # PEFT's, of every method; files that PEFT wrote state it
_READABLE_METHODS = ("LORA", "LOHA", "LOKR")
_STARTS_FROM_THE_BASE = ("true", "false", "none", "gaussian", "eva", "orthogonal", "mica", "lycoris")
_STARTS_CHANGING_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # they subtract from it
_UNREADABLE_OPTIONS = {
    "alora_invocation_tokens": "it is only active after certain words of a prompt",
    "arrow_config": "it is routed between several adapters",
    "kasa_config": "it only fits weights that PEFT changed",
    "layer_replication": "it only fits a model whose layers were repeated",
    "monteclora_config": "it is a distribution over adapters",
    "target_parameters": "it changes parameters that are not layers",
    "use_bdlora": "its factors are block-diagonal",
    "use_qalora": "its inputs are averaged in groups",
}
_WITHOUT_EFFECT = frozenset(  # which modules have a layer, and how it was trained: the tensors are what came of it
    {
        "auto_mapping",
        "base_model_name_or_path",
        "bias",  # its tensors are refused
        "corda_config",
        "decompose_both",
        "decompose_factor",
        "ensure_weight_tying",
        "eva_config",
        "exclude_modules",
        "fan_in_fan_out",  # for GPT-2's layers; PEFT itself turns it off for others
        "inference_mode",
        "init_weights",
        "layers_pattern",
        "layers_to_transform",
        "loftq_config",
        "lora_bias",  # its tensors are read
        "lora_dropout",
        "lora_ga_config",
        "megatron_config",
        "megatron_core",
        "module_dropout",
        "modules_to_save",  # its tensors are refused
        "peft_version",
        "qalora_group_size",
        "rank_dropout",
        "rank_dropout_scale",
        "revision",
        "runtime_config",
        "target_modules",
        "task_type",
        "trainable_token_indices",  # its tensors are refused
        "use_effective_conv2d",
        "velora_config",
    }
)
_PARTS = (  # of PEFT's files, by the ends of their tensors' names
    (re.compile(r"\.(lora_E|ranknum)(\.\w+)?$"), "AdaLoRA, which is not supported", ""),
    (re.compile(r"\.lora_embedding_[AB](\.\w+)?$"), "a LoRA of a token embedding", "without embeddings as targets"),
    (re.compile(r"trainable_tokens_"), "trained tokens (trainable_token_indices)", "without trained tokens"),
    (re.compile(r"\.bias$"), "biases of the model itself (bias or modules_to_save)", "with bias='none' or lora_bias"),
    (re.compile(r"\.weight$"), "whole modules (modules_to_save)", "without modules_to_save"),
)


def _require_expressions(patterns: Any) -> Any:
    """Check that the keys of a table are regular expressions as PEFT uses them.

    Raises:
        ValueError: One is none.
    """
    for pattern in patterns if isinstance(patterns, dict) else ():
        try:
            _compiled(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(f"has the key {pattern}, which is not a valid regular expression ({error}),") from None
    return patterns


def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(.*\.)?({pattern})$")


_Positive = Annotated[float, Field(gt=0)]


class PeftConfig(BaseModel):
    """The options of a configuration that affect the delta; the rest is in `model_extra`.

    Attributes:
        peft_type: PEFT's name of the method, such as "LORA".
        r: Rank of the modules that `rank_pattern` does not name.
        lora_alpha: Alpha of the modules that `alpha_pattern` does not name; a LoHa's or LoKr's is `alpha`.
        rank_pattern: End of a module's path, as a regular expression → rank.
        alpha_pattern: The same → alpha.
        use_rslora: Whether the scale is alpha / √rank instead of alpha / rank.
        use_dora: Whether every module is a DoRA.
        init_lora_weights: The initialisation.
    """

    model_config = ConfigDict(strict=True, frozen=True, extra="allow", allow_inf_nan=False)

    peft_type: str | None = None
    r: _Positive | None = None
    lora_alpha: float | None = None
    alpha: float | None = None
    rank_pattern: Annotated[dict[str, _Positive] | None, BeforeValidator(_require_expressions)] = None
    alpha_pattern: Annotated[dict[str, float] | None, BeforeValidator(_require_expressions)] = None
    use_rslora: bool | None = None
    use_dora: bool | None = None
    init_lora_weights: bool | str | None = None

    def alpha_of(self, path: str, rank: int) -> float:
        """The alpha of a module, for the scale alpha / rank.

        Args:
            path: Its dotted path in the network, as in PEFT.
            rank: Its rank.
        """
        alpha = _value_for_path(self.alpha_pattern, path, self._usual_alpha)
        return alpha * rank**0.5 if self.use_rslora else alpha

    def scale_of_whole_lokr(self, path: str) -> float:
        """The scale of a LoKr with whole factors: PEFT scales it as well, by its configuration's alpha / rank."""
        rank = _value_for_path(self.rank_pattern, path, _DEFAULT_ALPHA if self.r is None else self.r)
        return _value_for_path(self.alpha_pattern, path, self._usual_alpha) / rank

    @property
    def _usual_alpha(self) -> float:
        stated = [alpha for alpha in (self.lora_alpha, self.alpha) if alpha is not None]
        return stated[0] if stated else _DEFAULT_ALPHA


_SHAPE = TypeAdapter(PeftConfig)


@dataclass(frozen=True)
class PeftConfigs:
    """The configurations of an adapter's networks.

    Attributes:
        by_component: "unet", "text_encoder" … → its configuration.
        other: That of networks without their own; None: there is none.
    """

    by_component: Mapping[str, PeftConfig] = field(default_factory=dict)
    other: PeftConfig | None = None

    def of(self, component: str) -> PeftConfig | None:
        """A network's configuration; None if it has none."""
        return self.by_component.get(component, self.other)


def parse_config(content: bytes, source: str) -> PeftConfig:
    """The configuration in an adapter_config.json.

    Args:
        content: The file's.
        source: Its name, for messages.

    Raises:
        AdapterError: It is not a valid configuration, or the adapter can't be read; names the option.
    """
    try:
        values = parse_json(content, OBJECT)
    except ValueError as error:
        raise _unreadable(source, error) from None
    return _config_from(values, source)


def configs_in_metadata(metadata: Mapping[str, str]) -> PeftConfigs:
    """The configurations that diffusers writes into the metadata of a file, "<component>.<option>" → value.

    Raises:
        AdapterError: They are not valid configurations, or the adapter can't be read; names the option.
    """
    if HEADER_KEY not in metadata:
        return PeftConfigs()
    try:
        values = parse_json(metadata[HEADER_KEY], OBJECT)
    except ValueError as error:
        raise _unreadable(f"Its metadata {HEADER_KEY}", error) from None
    options: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        component, _, name = key.rpartition(".")
        options.setdefault(component_of_folder(component), {})[name] = value
    configs = {name: _config_from(values, f"Its metadata {HEADER_KEY} {name}") for name, values in options.items()}
    return PeftConfigs(configs, configs.pop("", None))


def _unreadable(source: str, error: Exception) -> AdapterError:
    return AdapterError(
        f"{source} can't be read: {error}.", "Save the adapter again with the program that wrote it, or choose another."
    )


def _config_from(values: Mapping[str, Any], source: str) -> PeftConfig:
    try:
        config = checked_shape(dict(values), _SHAPE)
    except ValueError as error:
        raise _unreadable(source, error) from None
    _require_readable(config, source)
    return config


def _require_readable(config: PeftConfig, source: str) -> None:
    """Refuse what changes the result and can't be read, and name what is not known.

    Raises:
        AdapterError: There is such an option.
    """
    if config.peft_type is not None and config.peft_type.upper() not in _READABLE_METHODS:
        raise AdapterError(
            f"The adapter's PEFT method, {config.peft_type}, is not supported.",
            "Use a LoRA, DoRA, LoHa or LoKr.",
        )
    start = str(config.init_lora_weights).lower()
    if start.startswith(_STARTS_CHANGING_THE_BASE):
        raise AdapterError(
            f"The adapter only fits base weights that PEFT changed before training (init_lora_weights {start}).",
            "Save it again with PEFT's path_initial_model_for_weight_conversion.",
        )
    if start not in _STARTS_FROM_THE_BASE:
        raise AdapterError(
            f"{source} has an unknown init_lora_weights, {start}: PEFT may have changed the base weights.",
            "Save it again with PEFT's path_initial_model_for_weight_conversion.",
        )
    options = config.model_extra or {}
    set_options = [name for name, value in options.items() if value not in (None, False, 0, "", [], {})]
    for name in set_options:
        if name in _UNREADABLE_OPTIONS:
            raise AdapterError(
                f"The adapter was made with PEFT's {name}, which is not supported: {_UNREADABLE_OPTIONS[name]}.",
                f"Train one without {name}.",
            )
    unknown = sorted(set(set_options) - _WITHOUT_EFFECT)
    if unknown:
        logger.warning(
            "%s has unknown options (%s), which are ignored: the adapter may have a different effect here",
            source,
            ", ".join(unknown),
        )


def refuse_unread_parts(unread_names: Collection[str]) -> None:
    """Refuse what PEFT saved in addition to the layers, since the result would lack it.

    Args:
        unread_names: Names of those tensors of a file that belong to no layer.

    Raises:
        AdapterError: One is PEFT's.
    """
    for name in unread_names:
        if not name.startswith(PEFT_PREFIX):
            continue
        for pattern, part, option in _PARTS:
            if pattern.search(name):
                remedy = f"Train one {option}." if option else "Use a LoRA, DoRA, LoHa or LoKr."
                raise AdapterError(
                    f"The adapter contains {part}: {name}. Ignoring it would change the adapter's effect.", remedy
                )
        raise AdapterError(
            f"The adapter contains the unknown PEFT tensor {name}. Ignoring it would change the adapter's effect.",
            "Use a LoRA, DoRA, LoHa or LoKr.",
        )


def _value_for_path(patterns: Mapping[str, float] | None, path: str, default: float) -> float:
    """The value of the first pattern that a module's path ends with, as PEFT compares them."""
    for pattern, value in (patterns or {}).items():
        if _compiled(pattern).match(path):
            return value
    return default
