"""The demo's flow-matching sibling: a small FLUX.2 klein over the same world and the same autoencoder.

Its text encoder is a Qwen 3 that has learned to repeat captions; the transformer reads it as klein's does.
Every function is seeded by a generator of its own; torch's global random state is left as it was.
"""

import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL, AutoencoderKLFlux2, Flux2Transformer2DModel
from palette import SIZE
from tokenizers import Regex as Pattern
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from training import CAPTION_DROPOUT, SEED, Interruptible, Phase, seeded_weights, train
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen3Config, Qwen3ForCausalLM
from words import RARE_WORDS

LOG = logging.getLogger("demo")

MAX_TOKENS = 32
"""Number of tokens that the transformer reads of a prompt, those of the chat template included."""

ANSWER_TOKENS = 16
"""Number of tokens of the language model's answers."""

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
THINKING_TOKENS = ("<think>", "</think>")
TEMPLATE = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n\n</think>\n\n{% endif %}"
)
# How every Qwen splits a text before it looks for byte pairs
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

LAYERS = (9, 18, 27)
"""After how many of Qwen 3's layers klein reads hidden states; side by side they are the prompt's embedding."""

TEXT_WIDTH = 64
SHIFT_MU = 0.5 + (1.15 - 0.5) / (4096 - 256) * ((SIZE // 8) ** 2 - 256)
"""FLUX's shift of noise levels for as many tokens as a picture has."""

LANGUAGE = Phase("language", steps=400, batch_size=32, learning_rate=2e-3, warmup_share=0.1, beta2=0.98)
TRANSFORMER = Phase("transformer", steps=9400, batch_size=16, learning_rate=1e-3, warmup_share=0.05, ema_decay=0.999)


def train_language_vocabulary(captions: Sequence[str], folder: Path) -> None:
    """Learns a byte-level vocabulary and writes it as Qwen's tokenizer, with its special tokens.

    Args:
        captions: The vocabulary is learned from these.
        folder: Of the files; it must exist.
    """
    words = sorted(set(" ".join(captions).split()) | set(RARE_WORDS))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Pattern(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=1000, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    spoken = [f" {word}" for word in words] + ["user", "assistant", "\n\n"]
    tokenizer.train_from_iterator([*captions[:4000], *spoken * 3], trainer)
    learned = json.loads(tokenizer.to_str())["model"]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in learned["merges"]]
    first = len(learned["vocab"])
    added = {
        str(first + number): {
            "content": token,
            "special": token in SPECIAL_TOKENS,
            **dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False),
        }
        for number, token in enumerate((*SPECIAL_TOKENS, *THINKING_TOKENS))
    }
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "added_tokens_decoder": added,
        "add_prefix_space": False,
        "bos_token": None,
        "chat_template": CHAT_TEMPLATE,
        "eos_token": "<|im_end|>",
        "model_max_length": MAX_TOKENS,
        "pad_token": "<|endoftext|>",
        "unk_token": None,
    }
    contents = {
        "vocab.json": json.dumps(learned["vocab"], ensure_ascii=False),
        "merges.txt": "\n".join(["#version: 0.2", *merges]) + "\n",
        "tokenizer_config.json": json.dumps(config, indent=2) + "\n",
    }
    for name, content in contents.items():
        (folder / name).write_text(content, encoding="utf-8", newline="\n")


def load_language_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Loads the tokenizer that `train_language_vocabulary` wrote."""
    return AutoTokenizer.from_pretrained(folder)


def tokenize_in_template(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> Tensor:
    """Turns texts into token numbers of shape (len(texts), MAX_TOKENS), as klein reads prompts: padded on the right."""
    return _padded(tokenizer, [TEMPLATE.format(text) for text in texts], MAX_TOKENS)


def _padded(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], length: int) -> Tensor:
    encoded = tokenizer(
        list(texts),
        padding="max_length",
        padding_side="right",
        max_length=length,
        truncation=True,
        return_tensors="pt",
    )
    return encoded.input_ids


def train_language(
    captions: Sequence[str], tokenizer: PreTrainedTokenizerBase, effort: float, device: torch.device
) -> Qwen3ForCausalLM:
    """Trains a language model to repeat what it is told, in klein's chat template: so it tells all words apart.

    One that only continues captions forgets which colour or place it has read, since all go on alike. For the same
    reason the words' embeddings are as large as what the layers add to them.

    Args:
        captions: Of the world's pictures.
        tokenizer: From `load_language_tokenizer`.
        effort: Scales the number of steps.
        device: Where to train.
    """
    with seeded_weights():
        model = Qwen3ForCausalLM(
            Qwen3Config(
                vocab_size=len(tokenizer),
                hidden_size=TEXT_WIDTH,
                intermediate_size=3 * TEXT_WIDTH,
                num_hidden_layers=LAYERS[-1] + 1,
                num_attention_heads=2,
                num_key_value_heads=1,
                head_dim=32,
                max_position_embeddings=MAX_TOKENS,
                tie_word_embeddings=False,
                bos_token_id=tokenizer.convert_tokens_to_ids("<|endoftext|>"),
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
        torch.nn.init.normal_(model.get_input_embeddings().weight)
    model.to(device)
    answered = [f"{TEMPLATE.format(caption)}{caption}<|im_end|>" for caption in captions]
    tokens = _padded(tokenizer, answered, MAX_TOKENS + ANSWER_TOKENS)
    generator = torch.Generator().manual_seed(SEED)

    def loss_at(_step: int) -> Tensor:
        chosen = torch.randint(len(tokens), (LANGUAGE.batch_size,), generator=generator)
        ids = tokens[chosen].to(device)
        mask = ids != tokenizer.pad_token_id
        return model(input_ids=ids, attention_mask=mask.long(), labels=ids.where(mask, -100)).loss

    train(model, LANGUAGE.scaled(effort), loss_at)
    return model


@torch.no_grad()
def embed_unused_words(model: Qwen3ForCausalLM, used: set[int], generator: torch.Generator) -> None:
    """Gives tokens that no caption uses random embeddings of the average length of the others.

    As a real language model's rare tokens have; here training leaves theirs alike.

    Args:
        model: Changed in place; it must be on the CPU.
        used: Numbers of the tokens that captions use; their embeddings stay as they are.
        generator: Source of random numbers.
    """
    embeddings = model.get_input_embeddings().weight
    length = embeddings[sorted(used)].norm(dim=1).mean()
    for number in range(embeddings.shape[0]):
        if number not in used:
            direction = torch.randn(embeddings.shape[1], generator=generator)
            embeddings[number] = length * direction / direction.norm()


@torch.no_grad()
def encode_in_template(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerBase, captions: Sequence[str], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Encodes every different caption once, as klein reads it.

    Returns:
        Embeddings of the empty caption and of all different captions, (1 + different, MAX_TOKENS, 3 · TEXT_WIDTH),
        and for each caption the row of its embedding, (len(captions),).
    """
    different = sorted(set(captions))
    tokens = tokenize_in_template(tokenizer, ["", *different]).to(device)
    embeddings = []
    for batch in tokens.split(256):
        mask = (batch != tokenizer.pad_token_id).long()
        states = model.model(input_ids=batch, attention_mask=mask, output_hidden_states=True).hidden_states
        embeddings.append(torch.cat([states[layer] for layer in LAYERS], dim=-1))
    row_by_caption = {caption: row for row, caption in enumerate(different, start=1)}
    return torch.cat(embeddings), torch.tensor([row_by_caption[caption] for caption in captions])


def flux2_autoencoder(vae: AutoencoderKL, latents: Tensor) -> AutoencoderKLFlux2:
    """Makes FLUX.2's autoencoder of the demo's: the same networks, with statistics in place of a scaling factor.

    Args:
        vae: The demo's autoencoder.
        latents: Means of many pictures' latents, not scaled, (n, channels, height, width).
    """
    names = ("block_out_channels", "down_block_types", "up_block_types", "layers_per_block", "latent_channels")
    config = {name: vae.config[name] for name in (*names, "norm_num_groups", "sample_size")}
    made = AutoencoderKLFlux2(**config)
    patched = torch.nn.functional.pixel_unshuffle(latents, 2)
    statistics = {
        "bn.running_mean": patched.mean(dim=(0, 2, 3)),
        "bn.running_var": patched.var(dim=(0, 2, 3)),
        "bn.num_batches_tracked": torch.tensor(0),
    }
    made.load_state_dict({**vae.state_dict(), **statistics})
    return made.eval()


def normalized_latents(vae: AutoencoderKLFlux2, latents: Tensor) -> Tensor:
    """Turns an autoencoder's latents, not scaled, into those that the transformer reads: 2×2 numbers are a token."""
    mean = vae.bn.running_mean.view(1, -1, 1, 1)
    deviation = torch.sqrt(vae.bn.running_var.view(1, -1, 1, 1) + vae.config.batch_norm_eps)
    return (torch.nn.functional.pixel_unshuffle(latents, 2) - mean) / deviation


def train_transformer(
    latents: Tensor, embeddings: Tensor, rows: Tensor, effort: float, device: torch.device, state: Path
) -> Flux2Transformer2DModel:
    """Trains the transformer by flow matching, with an average of its weights.

    Noise levels are logit-normal, shifted as FLUX's; a tenth of the captions is dropped for classifier-free guidance.

    Args:
        latents: From `normalized_latents`, (n, channels, height, width), on `device`.
        embeddings: Embeddings of captions, the empty one first, on `device`.
        rows: The row of each latent's caption in `embeddings`, (n,).
        effort: Scales the number of steps.
        device: Where to train.
        state: File of the training's state, with which it goes on after an interruption.
    """
    _, channels, height, width = latents.shape
    with seeded_weights():
        transformer = Flux2Transformer2DModel(
            in_channels=channels,
            num_layers=1,
            num_single_layers=4,
            num_attention_heads=4,
            attention_head_dim=64,
            axes_dims_rope=(16, 16, 16, 16),
            joint_attention_dim=embeddings.shape[-1],
            timestep_guidance_channels=256,
            guidance_embeds=False,
        )
    transformer.to(device)
    tokens = latents.flatten(2).transpose(1, 2).contiguous()
    picture_places = _places(1, height, width, 1).to(device)
    text_places = _places(1, 1, 1, embeddings.shape[1]).to(device)
    generator = torch.Generator().manual_seed(SEED)
    batch = (TRANSFORMER.batch_size,)

    def loss_at(_step: int) -> Tensor:
        chosen = torch.randint(len(tokens), batch, generator=generator)
        dropped = torch.rand(batch, generator=generator) < CAPTION_DROPOUT
        condition = embeddings[torch.where(dropped, 0, rows[chosen]).to(device)]
        clean = tokens[chosen.to(device)]
        noise = torch.randn(clean.shape, generator=generator).to(device)
        sigmas = shifted(torch.randn(batch, generator=generator).sigmoid(), SHIFT_MU).to(device)
        levels = sigmas[:, None, None]
        predicted = transformer(
            hidden_states=(1 - levels) * clean + levels * noise,
            encoder_hidden_states=condition,
            timestep=sigmas,
            img_ids=picture_places,
            txt_ids=text_places,
            return_dict=False,
        )[0]
        return (predicted - (noise - clean)).square().mean()

    phase = TRANSFORMER.scaled(effort)
    origin = f"{phase} {latents.double().sum():.6f} {embeddings.double().sum():.6f} {len(rows)}"
    train(transformer, phase, loss_at, Interruptible(state, generator, origin))
    return transformer


def shifted(sigmas: Tensor, mu: float) -> Tensor:
    """Moves noise levels in [0, 1] towards noise, by FLUX's μ."""
    shift = math.exp(mu)
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def _places(*counts: int) -> Tensor:
    """The places of tokens along picture, rows, columns and text, (tokens, 4)."""
    return torch.cartesian_prod(*(torch.arange(count) for count in counts)).float()
