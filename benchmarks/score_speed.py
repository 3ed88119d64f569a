"""Measures scoring against the bare forward passes of its models, side by side in one run; prints the ratio.

    python benchmarks/score_speed.py [--pictures 100] [--side 512] [--rounds 3]

A random CLIP ViT-B/32 of real size scores pictures: opened, decoded, preprocessed, run and compared. The bare passes
take pixels that are ready, in batches of the same size. Medians of the rounds, which take turns.
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
from trainer.data.images import load_pictures  # noqa: E402
from trainer.evaluation.feature_extractors import (  # noqa: E402
    BATCH,
    FeatureExtractors,
    FeatureModel,
)
from trainer.evaluation.score_table import score_pictures  # noqa: E402


def timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=100)
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    processor = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
    network = transformers.CLIPModel(transformers.CLIPConfig()).eval()
    model = FeatureModel("random ViT-B/32", "clip", network, processor())
    with tempfile.TemporaryDirectory() as scratch:
        drawn, subject = Path(scratch, "drawn"), Path(scratch, "subject")
        for folder, count in ((drawn, arguments.pictures), (subject, 4)):
            folder.mkdir()
            for number in range(count):
                noise = np.random.default_rng(number).integers(0, 256, (64, 64, 3), dtype=np.uint8)
                picture = Image.fromarray(noise).resize((arguments.side, arguments.side), Image.Resampling.BICUBIC)
                picture.save(folder / f"{number:03d}.png")
        listener = SilentListener()
        pictures, references = (load_pictures(folder, "", listener) for folder in (drawn, subject))
        total = len(pictures) + len(references)

        @torch.no_grad()
        def bare() -> None:
            for start in range(0, total, BATCH):
                pixels = torch.zeros(min(BATCH, total - start), 3, 224, 224)
                network.visual_projection(network.vision_model(pixel_values=pixels).pooler_output)

        rounds = []
        for _ in range(arguments.rounds + 1):
            scoring = timed(lambda: score_pictures(pictures, [], references, FeatureExtractors(model), listener))
            rounds.append((scoring, timed(bare)))
    scored, passed = (statistics.median(column) for column in zip(*rounds[1:], strict=True))  # the first warms up
    facts = {"pictures": total, "side": arguments.side, "scoring": scored, "bare": passed, "ratio": scored / passed}
    print(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
