"""Measures scoring against the bare forward passes of its models, side by side in one run; prints the ratio.

    python benchmarks/score_speed.py [--pictures 100] [--side 512] [--rounds 3]

A random CLIP ViT-B/32 of real size scores pictures: opened, decoded, preprocessed, encoded and compared. The bare
passes take preprocessed pixels, in batches of the same size. Medians of the rounds, in which the two take turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]
sys.dont_write_bytecode = True

import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from PIL import Image  # noqa: E402

from trainer.core.events import SilentListener  # noqa: E402
from trainer.core.garbage import own_process  # noqa: E402
from trainer.data.images import load_pictures  # noqa: E402
from trainer.evaluation.feature_extractors import BATCH, FeatureExtractors, FeatureModel  # noqa: E402
from trainer.evaluation.score_table import score_pictures  # noqa: E402


def seconds_of(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def write_pictures(folder: Path, count: int, side: int) -> Path:
    """Noisy pictures in a new folder."""
    folder.mkdir()
    for number in range(count):
        noise = np.random.default_rng(number).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        image = Image.fromarray(noise).resize((side, side), Image.Resampling.BICUBIC)
        image.save(folder / f"{number:03d}.png")
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=100)
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    side = arguments.side
    torch.manual_seed(0)
    processor = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
    network = transformers.CLIPModel(transformers.CLIPConfig()).eval()
    model = FeatureModel("random ViT-B/32", "clip", network, processor())
    with tempfile.TemporaryDirectory() as scratch:
        listener = SilentListener()
        pictures = load_pictures(write_pictures(Path(scratch, "pictures"), arguments.pictures, side), "", listener)
        references = load_pictures(write_pictures(Path(scratch, "subject"), 4, side), "", listener)
        total = len(pictures) + len(references)

        def score() -> None:
            score_pictures(pictures, [], references, FeatureExtractors(model), listener)

        @torch.no_grad()
        def bare_passes() -> None:
            for start in range(0, total, BATCH):
                pixels = torch.zeros(min(BATCH, total - start), 3, 224, 224)
                network.visual_projection(network.vision_model(pixel_values=pixels).pooler_output)

        score()  # both warm up
        bare_passes()
        rounds = [(seconds_of(score), seconds_of(bare_passes)) for _ in range(arguments.rounds)]
    scoring = statistics.median(seconds for seconds, _ in rounds)
    bare = statistics.median(seconds for _, seconds in rounds)
    facts = {"pictures": total, "side": side, "scoring": scoring, "bare": bare, "ratio": scoring / bare}
    print(json.dumps(facts, indent=1))


if __name__ == "__main__":
    with own_process():
        main()
