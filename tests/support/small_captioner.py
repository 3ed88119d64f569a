"""A captioner with random weights, small enough to be made in a test."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "an", "the", "photo", "of", "dog", "cat", "sofa", "on"]
WORDS += ["in", "with", "red", "blue", "sitting", "two", "dogs", "tree", "grass", "standing", "next", "to", "ball"]


def tiny_blip(folder: Path, kind: str = "BlipForConditionalGeneration", end: float = -4.0) -> Path:
    """A random BLIP with a vocabulary of a few words, as transformers writes it; `end`: how it likes to stop."""
    torch.manual_seed(4)
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    tower |= {"initializer_range": 1.0, "projection_dim": 16}
    text = tower | {"vocab_size": len(WORDS), "encoder_hidden_size": 32, "max_position_embeddings": 48}
    text |= {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "sep_token_id": 3}
    vision = tower | {"image_size": 32, "patch_size": 8}
    config = transformers.BlipConfig(text_config=text, vision_config=vision, projection_dim=16)
    network = getattr(transformers, kind)(config)
    if kind == "BlipForConditionalGeneration":
        network.text_decoder.cls.predictions.bias.data[WORDS.index("[SEP]")] += end
    network.save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    tokenizer = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": 48}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    pictures = {"do_resize": True, "size": {"height": 32, "width": 32}, "resample": 3, "do_rescale": True}
    pictures |= {"rescale_factor": 1 / 255, "do_normalize": True, "image_processor_type": "BlipImageProcessor"}
    pictures |= {"image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28]}
    (folder / "preprocessor_config.json").write_text(json.dumps(pictures))
    return folder
