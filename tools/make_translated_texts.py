"""Writes tests/golden/translated_texts.json, which records the English texts that the other languages translate.

    python tools/make_translated_texts.py [--out FILE]

Run it once a description or tooltip that changed in locales/en is translated anew in every other language: a test fails
until then. Needs no ComfyUI.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "tests" / "golden" / "translated_texts.json"


def explanations(texts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Descriptions and tooltips of a nodeDefs.json, each after its place, such as DreamBoothTrainLora.inputs.rank."""
    for node, node_texts in texts.items():
        yield node, node_texts["description"]
        for part in ("inputs", "outputs"):
            for key, shown in node_texts[part].items():
                if "tooltip" in shown:
                    yield f"{node}.{part}.{key}", shown["tooltip"]


def digest(text: str) -> str:
    """Eight hexadecimal digits that change with a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=FILE, metavar="FILE", help="default: in tests/golden")
    arguments = parser.parse_args()
    texts = json.loads((ROOT / "locales" / "en" / "nodeDefs.json").read_text(encoding="utf-8"))
    digests = sorted({digest(text) for _, text in explanations(texts)})
    arguments.out.write_text(json.dumps(digests, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
