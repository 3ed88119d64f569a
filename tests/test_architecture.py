"""What an import of the pack costs. The directions of imports are held by `make lint` (import-linter and ruff)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT

HEAVY = {"diffusers", "transformers", "peft", "accelerate", "huggingface_hub", "matplotlib"}


@pytest.mark.parametrize(
    "what",
    ["", "trainer.settings.train", "trainer.cli.flags", "trainer.__main__"],
    ids=["the pack", "settings", "flags", "command line"],
)
def test_import_is_light(what: str, tmp_path: Path) -> None:
    """ComfyUI's start and --help wait for none of the big libraries."""
    code = (
        "import importlib.util, sys\n"
        "spec = importlib.util.spec_from_file_location("
        f"'pack', {str(ROOT / '__init__.py')!r}, submodule_search_locations=[{str(ROOT)!r}])\n"
        "pack = sys.modules['pack'] = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(pack)\n"
        f"what = {what!r}\n"
        "if what: importlib.import_module('pack.' + what)\n"
        f"print(*sorted({ ({'torch', 'numpy', 'PIL'} | HEAVY)!r} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
