"""Adapters that can't be read, recognised by their names: for other model families, and of other types.

A family is recognised by its modules, since metadata is often missing or wrong; where several families share module
names, a width decides. Names in the original code, in diffusers and with underscores are all recognised.
Sources: comfy/lora.py and comfy/utils.py of ComfyUI, loaders/lora_conversion_utils.py of diffusers.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

Shapes = Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class _Marks:
    """What shows a family.

    Attributes:
        title: For people.
        pattern: Is found in keys of its modules, as whole words; `~` stands for a dot or an underscore, `#` for digits.
        widths: Numbers of inputs of those modules, if these are needed to tell it from another family; () if not.
        is_unet: Whether the modules belong to a UNet with blocks like those of the families that can be read.
    """

    title: str
    pattern: str
    widths: tuple[int, ...] = ()
    is_unet: bool = False

    def fit(self, key: str, shape: Sequence[int]) -> bool:
        """Whether a tensor of that key and shape (() if not known) is of a module of this family."""
        if self.is_unet != (_IN_UNET.search(key) is not None):
            return False
        if self.widths and (len(shape) < 2 or shape[1] not in self.widths):
            return False
        expression = self.pattern.replace("~", "[._]").replace("#", r"\d+")
        return re.search(rf"(?:^|[._])(?:{expression})(?:[._]|$)", key) is not None


_IN_UNET = re.compile(r"(?:down|up|input|output)_blocks[._]\d|(?:mid|middle)_block[._]")
_FAMILIES = (  # the first that fits counts: names that only one family has stand before those of several
    _Marks(
        "Stable Cascade", "(?:down|up)_blocks~#~#~(?:attention|channelwise|depthwise|mapper|kv_mapper)", is_unet=True
    ),
    _Marks("AnimateDiff", "motion_modules", is_unet=True),
    _Marks("Stable Video Diffusion", "time_stack|time_mixer|temporal_transformer_blocks", is_unet=True),
    _Marks("Kandinsky or DeepFloyd IF", "attentions~#~add_[kv]_proj", is_unet=True),
    _Marks("Stable Cascade", "lora_prior_(?:unet|te)|clip_txt_mapper"),
    _Marks("Kandinsky 5", "(?:visual|text)_transformer_blocks~#"),
    _Marks("Chroma", "distilled_guidance_layer"),
    _Marks("HunyuanVideo", "individual_token_refiner|context_embedder~token_refiner"),
    _Marks("HunyuanVideo", r"double_blocks\.#\.(?:(?:img|txt)_attn_(?:qkv|proj)|.*mlp\.fc[12]|.*mod\.linear)"),
    _Marks("HunyuanDiT", "mlp_t5|default_modulation|blocks~#~attn[12]~(?:Wqkv|kv_proj|q_proj|out_proj)"),
    _Marks("AuraFlow", "(?:joint_transformer_blocks|double_layers|single_layers)~#"),
    _Marks("AuraFlow", "single_transformer_blocks~#~ff~(?:linear_[12]|out_projection)"),
    _Marks("Flux, Chroma or HunyuanVideo", "(?:double_blocks|single_blocks|single_transformer_blocks)~#"),
    _Marks("HiDream", "(?:double|single)_stream_blocks~#"),
    _Marks("OmniGen 2", "(?:double|single)_stream_layers~#"),
    _Marks("Stable Diffusion 3", "joint_blocks~#"),
    _Marks("Qwen-Image", "transformer_blocks~#~(?:img|txt)_(?:mlp|mod)"),
    _Marks("Cosmos", "blocks~block#~blocks"),
    _Marks("Cosmos", "blocks~#~(?:(?:self|cross)_attn~(?:[qkv]|output)_proj|mlp~layer[12]|adaln_modulation_.+)"),
    _Marks("PixArt", "blocks~#~(?:cross_attn~(?:q|kv)_linear|attn~(?:qkv|proj)|mlp~fc[12])"),
    _Marks("Wan", "blocks~#~(?:(?:self|cross)_attn~(?:[qkvo]|[kv]_img)|ffn)|lora_unet__blocks"),
    _Marks("PixArt", "pos_embed~proj|ar_embedder|csize_embedder"),
    _Marks("Mochi", "blocks~#~(?:attn~(?:qkv|proj)_[xy]|mlp_[xy])"),
    _Marks("LTX-Video", "patchify_proj|audio_adaln_single"),
    _Marks("Sana", "transformer_blocks~#~ff~conv_(?:inverted|depth|point)"),
    _Marks("Lumina", "layers~#~(?:adaLN_modulation~1|attn~to_(?:[qkv]|out)|feed_forward~linear_[123])"),
    _Marks("Lumina", "layers~#~(?:attention|feed_forward)", (2304, 9216)),
    _Marks(
        "a relative of Z-Image, such as Lumina",
        "layers~#~(?:attention|feed_forward)|(?:noise|context)_refiner~#|cap_embedder",
    ),
    _Marks("ACE-Step", "lyric_encoder|genre_embedder|speaker_embedder"),
    _Marks("Stable Diffusion 3", "transformer_blocks~#~(?:attn|ff|norm1)", (1536, 2432)),
    _Marks("Flux, Chroma or Qwen-Image", "transformer_blocks~#~attn~(?:to|add)", (3072,)),
    _Marks("Flux, Stable Diffusion 3 or Qwen-Image", "transformer_blocks~#~(?:attn|ff_context|norm1_context)"),
    _Marks("PixArt or Sana", "transformer_blocks~#~attn[12]", (1152, 2240)),
    _Marks("LTX-Video", "transformer_blocks~#~attn[12]", (2048, 4096)),
    _Marks("CogVideoX", "transformer_blocks~#~attn1", (1920, 3072)),
    _Marks("a diffusion transformer, such as PixArt, LTX-Video or CogVideoX", "(?:transformer_)?blocks~#"),
    _Marks("a diffusion transformer", "(?:lora_)?transformer"),
    _Marks("Stable Diffusion 3 or Flux: it has a T5", "lora_te3|text_encoder_3|t5(?:xxl)?"),
)
_KINDS = (
    (r"\.ia3_l(?:\.|$)|\.on_input$", "IA3"),
    (r"\.(?:oft_diag|oft_[Rr](?:\..*)?)$", "OFT as PEFT writes it"),
    (r"\.boft_[Rs](?:\..*)?$", "BOFT as PEFT writes it"),
    (r"\.(?:a[12]|b[12])\.weight$|\.glora_", "GLoRA"),
    (r"\.hra_", "HRA"),
    (r"\.(?:p?vera)_lambda_", "VeRA"),
    (r"\.vblora_", "VB-LoRA"),
    (r"\.randlora_", "RandLoRA"),
    (r"\.fourierft_", "FourierFT"),
    (r"\.(?:miss|bone)_", "MiSS (Bone)"),
    (r"\.(?:shira|road|c3a|waveft|delora|gralora|hira|psoft|tinylora|unilora|lily|deft)_", "another method of PEFT"),
    (r"\.bias_(?:indices|values|size)$", "LoCon with sparse biases"),
    (r"_custom_diffusion\.weight$", "Custom Diffusion"),
    (r"\.(?:set_weight|reshape_weight)$", "weights to be set"),
    (r"^lora_controlnet$|^lora_controlnet\.", "ControlNet"),
    (r"^lllite_", "ControlNet-LLLite"),
    (r"^(?:ip_adapter|image_proj)\.", "IP-Adapter"),
    (r"^(?:unet|text_encoder)(?::\d+)+:(?:up|down)$", "LoRA by number, as cloneofsimo's lora wrote it"),
    (r"^(?:emb_params|string_to_param\.\*|clip_[lgh])$", "embedding (textual inversion)"),
)
_FAMILIES_IN_WORDS = (
    ("Flux", r"flux"),
    ("Stable Diffusion 3", r"stable-diffusion-3|\bsd_?3"),
    ("Stable Cascade", r"cascade"),
    ("Chroma", r"chroma"),
    ("Hunyuan", r"hunyuan"),
    ("Wan", r"\bwan"),
    ("Qwen-Image", r"qwen"),
    ("Lumina", r"lumina"),
    ("PixArt", r"pixart"),
    ("AuraFlow", r"auraflow"),
    ("Cosmos", r"cosmos"),
    ("LTX-Video", r"\bltx"),
    ("HiDream", r"hidream"),
    ("Sana", r"\bsana"),
    ("Kandinsky", r"kandinsky"),
)


def foreign_family(keys: Collection[str], shapes: Shapes) -> tuple[str, str] | None:
    """The unsupported family with modules of these names, and the key that shows it; None if there is none.

    Args:
        keys: Of tensors, as in the file; none is of a module of the supported families.
        shapes: Key → shape, as far as known.
    """
    in_order = sorted(keys)
    for marks in _FAMILIES:
        for key in in_order:
            if marks.fit(key, shapes.get(key, ())):
                return marks.title, key
    return None


def foreign_kind(keys: Collection[str]) -> tuple[str, str] | None:
    """The unsupported adapter type with tensors of these names, and one of them; None if there is none."""
    in_order = sorted(keys)
    for pattern, title in _KINDS:
        key = next((key for key in in_order if re.search(pattern, key)), None)
        if key is not None:
            return title, key
    return None


def foreign_family_in_words(words: str) -> str | None:
    """The unsupported family named by an adapter's metadata; None if there is none."""
    return next((title for title, pattern in _FAMILIES_IN_WORDS if re.search(pattern, words.lower())), None)
