"""The tokenizer of the world, its text encoder, and embeddings for tokens that no caption uses."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

MAX_TOKENS = 32
"""Length of every tokenized caption, its start and end tokens and padding included."""

ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789.,!?-'"
VOCABULARY_FILES = ("vocab.json", "merges.txt")
END_OF_WORD = "</w>"
SPECIAL_TOKENS = ("<|startoftext|>", "<|endoftext|>")

RARE_WORDS = (
    *("sks", "rraj", "pixel", "style", "art", "painting", "of", "the", "an", "in", "with"),
    *("photo", "person", "subject", "sunglasses", "wearing"),
)
"""Words that must be single tokens whether a caption uses them or not."""

TEXT_PREFIX = "text_model."


def train_vocabulary(captions: Sequence[str], folder: Path) -> None:
    """Learns a byte-pair vocabulary and writes it as CLIP's `vocab.json` and `merges.txt`.

    Args:
        captions: The vocabulary is learned from these; of the first 4000 it counts how often words occur,
            the others only add their words.
        folder: Of the two files; it must exist.
    """
    words = sorted(set(" ".join(captions).split()) | set(RARE_WORDS))
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix=END_OF_WORD))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    # Numbered in advance: pairs that are equally frequent are merged in the order of these numbers,
    # and letters that end a word would otherwise be numbered at random.
    letters = sorted(ALPHABET)
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        end_of_word_suffix=END_OF_WORD,
        special_tokens=[*letters, *reversed([letter + END_OF_WORD for letter in letters])],
        show_progress=False,
    )
    tokenizer.train_from_iterator([*captions[:4000], *words * 3], trainer)
    learned = json.loads(tokenizer.to_str())["model"]

    by_number = sorted(learned["vocab"], key=learned["vocab"].get)
    tokens = [*ALPHABET, *(letter + END_OF_WORD for letter in ALPHABET), *by_number, *SPECIAL_TOKENS]
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in learned["merges"]]
    contents = (json.dumps(vocabulary), "\n".join(["#version: 0.2", *merges]) + "\n")
    for name, content in zip(VOCABULARY_FILES, contents, strict=True):
        (folder / name).write_text(content, encoding="utf-8", newline="\n")


def load_tokenizer(folder: Path) -> CLIPTokenizer:
    """Loads the tokenizer that `train_vocabulary` wrote."""
    return CLIPTokenizer(*(str(folder / name) for name in VOCABULARY_FILES), model_max_length=MAX_TOKENS)


def save_tokenizer(tokenizer: CLIPTokenizer, vocabulary_folder: Path, folder: Path) -> None:
    """Writes a tokenizer for both transformers 4 and 5: the former reads two files that the latter leaves out.

    Args:
        tokenizer: From `load_tokenizer(vocabulary_folder)`.
        vocabulary_folder: In which `train_vocabulary` wrote those two files.
        folder: To write to.
    """
    tokenizer.save_pretrained(folder)
    for name in VOCABULARY_FILES:
        shutil.copyfile(vocabulary_folder / name, folder / name)


def tokenize(tokenizer: CLIPTokenizer, texts: Sequence[str]) -> Tensor:
    """Turns texts into token numbers of shape (len(texts), MAX_TOKENS)."""
    encoded = tokenizer(list(texts), padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt")
    return encoded.input_ids


def text_encoder_of(clip: CLIPModel) -> CLIPTextModel:
    """Copies the text tower of a CLIP model.

    transformers 4 names the copy's weights with a leading "text_model.", transformers 5 without.
    """
    text_encoder = CLIPTextModel(clip.config.text_config)
    prefixed = all(name.startswith(TEXT_PREFIX) for name in text_encoder.state_dict())
    prefix = TEXT_PREFIX if prefixed else ""
    weights = {prefix + name: weight for name, weight in clip.text_model.state_dict().items()}
    text_encoder.load_state_dict(weights)
    return text_encoder.eval()


def use_prefixed_names(weights_file: Path) -> None:
    """Gives all weights in a CLIP text encoder's file a leading "text_model.".

    transformers 5 writes them without, and transformers 4 would then load a random text encoder; with
    it both read the file.
    """
    weights = load_file(weights_file)
    named = {TEXT_PREFIX + name.removeprefix(TEXT_PREFIX): weight for name, weight in weights.items()}
    save_file(named, weights_file, metadata={"format": "pt"})


@torch.no_grad()
def embed_unused_tokens(text_encoder: CLIPTextModel, used: set[int], generator: torch.Generator) -> None:
    """Gives tokens that no caption uses random embeddings of the average length of the others.

    Training leaves their embeddings near zero, so that they have no effect in a prompt. A real CLIP's rare
    tokens have embeddings of ordinary length.

    Args:
        text_encoder: Changed in place; it must be on the CPU.
        used: Numbers of the tokens that captions use; their embeddings stay as they are.
        generator: Source of random numbers.
    """
    embeddings = text_encoder.get_input_embeddings().weight
    length = embeddings[sorted(used)].norm(dim=1).mean()
    for number in range(embeddings.shape[0]):
        if number not in used:
            direction = torch.randn(embeddings.shape[1], generator=generator)
            embeddings[number] = length * direction / direction.norm()
