"""The house rules, read from the source: floors, what may be imported where, and how long things may get."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from helpers import ROOT

TRAINER = ROOT / "trainer"
FLOORS = {
    # what can be said without a model
    "": 0,
    "adapter_settings": 0,
    "base_settings": 0,
    "caption_settings": 0,
    "config": 0,
    "data_settings": 0,
    "errors": 0,
    "merge_settings": 0,
    "objective_settings": 0,
    "score_settings": 0,
    "events": 0,
    "files": 0,
    "optimizer_settings": 0,
    "preview_settings": 0,
    "prompts": 0,
    "randomness": 0,
    "settings": 0,
    "shapes": 0,
    "sheets": 0,
    "subject_settings": 0,
    # mathematics and the machine
    "noise": 1,
    "objective": 1,
    "devices": 1,
    "averaging": 1,
    "live_memory": 1,
    "optimization": 1,
    "quantization": 1,
    "original_names": 1,
    "pace": 1,
    "team": 1,
    # the adapter file
    "scores": 1,
    "changes": 2,
    "kohya": 2,
    "layers": 2,
    "layers.base": 2,
    "layers.difference": 2,
    "layers.loha": 2,
    "layers.lokr": 2,
    "layers.lora": 2,
    "layers.oft": 2,
    "merge_methods": 2,
    "naming": 2,
    # models
    "clip_tokenizer": 3,
    "families": 3,
    "families.base": 3,
    "families.clip": 3,
    "families.ldm": 3,
    "families.sd1": 3,
    "families.sd2": 3,
    "families.sdxl": 3,
    "families.stable_diffusion": 3,
    "kinds": 3,
    "metadata": 3,
    "modules": 3,
    "pretrained": 3,
    "reading": 3,
    "selection": 3,
    "weights": 3,
    # what a run is made of
    "adapter_profile": 4,
    "adapters": 4,
    "applying": 4,
    "batches": 4,
    "cache": 4,
    "captioning": 4,
    "captions": 4,
    "checkpoint": 4,
    "checkpoint_file": 4,
    "checks": 4,
    "comparison": 4,
    "comparison_report": 4,
    "conversion": 4,
    "ends": 4,
    "evaluation": 4,
    "export": 4,
    "extraction": 4,
    "feature_files": 4,
    "feature_models": 4,
    "feature_shapes": 4,
    "fusing": 4,
    "inspection": 4,
    "fitting": 4,
    "gallery": 4,
    "judges": 4,
    "merge": 4,
    "memory_plan": 4,
    "metrics": 4,
    "trackers": 4,
    "merge_report": 4,
    "passes": 4,
    "picture_files": 4,
    "picture_check": 4,
    "pictures": 4,
    "previews": 4,
    "priors": 4,
    "sample": 4,
    "score_grid": 4,
    "scoring": 4,
    "shelf": 4,
    "studio": 4,
    "trained_weights": 4,
    "trainee": 4,
    # the recipe
    "dreambooth": 5,
    "learned_merge": 5,
    "dreambench": 5,
    # the command line
    "flags": 6,
    "presets": 6,
    "terminal": 6,
    "commands": 6,
    "merge_commands": 6,
    "plan_commands": 6,
    "score_commands": 6,
    "demo": 6,
    "__main__": 6,
}
HOSTS = {"comfy", "comfy_api", "comfy_extras", "comfy_execution", "execution", "folder_paths", "nodes", "server"}
UNTRUSTED = {"torchvision", "torchaudio"}
HEAVY = {"diffusers", "transformers", "peft", "accelerate", "huggingface_hub", "matplotlib"}
MAX_FILE, MAX_FUNCTION, MAX_RECIPE_FUNCTION = 400, 80, 120


@dataclass(frozen=True)
class Import:
    """One import statement: `module` is absolute, or starts with as many dots as it goes up."""

    module: str
    names: tuple[str, ...]
    line: int
    at_module_level: bool

    @property
    def top(self) -> str:
        return self.module.split(".")[0]


def imports_of(path: Path) -> list[Import]:
    found: list[Import] = []

    def visit(node: ast.AST, at_module_level: bool) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                found.extend(Import(alias.name, (), child.lineno, at_module_level) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                names = tuple(alias.name for alias in child.names)
                found.append(Import("." * child.level + (child.module or ""), names, child.lineno, at_module_level))
            visit(child, at_module_level and not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda))

    visit(ast.parse(path.read_text(encoding="utf-8")), True)
    return found


def module_of(path: Path) -> str:
    """The module's dotted name below trainer/; a package has the name of its folder."""
    parts = list(path.relative_to(TRAINER).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in sorted(TRAINER.rglob("*.py"))}


def imported_modules(module: str) -> Iterator[tuple[str, int]]:
    """Modules of the engine that a module of the engine imports, anywhere in it, with the line."""
    path = MODULES[module]
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    package = [part for part in package if part]
    for statement in imports_of(path):
        up = len(statement.module) - len(statement.module.lstrip("."))
        if not up:
            continue
        assert up - 1 <= len(package), f"{path.name}:{statement.line} reaches above trainer/"
        start = package[: len(package) - (up - 1)] + [part for part in statement.module.lstrip(".").split(".") if part]
        inner = [".".join([*start, name]) for name in statement.names]
        modules = [name for name in inner if name in MODULES]
        if len(modules) < len(inner):
            modules.append(".".join(start))
        for target in modules:
            yield target, statement.line


def python_files() -> list[Path]:
    folders = [ROOT / name for name in ("trainer", "nodes", "demo", "benchmarks")]
    files = [path for folder in folders for path in folder.rglob("*.py")]
    return sorted([*files, *ROOT.glob("*.py")])


def test_imports_are_read_from_inside_a_package_too() -> None:
    assert {"objective", "families.base"} <= {target for target, _ in imported_modules("families.stable_diffusion")}
    assert {"errors", "families.sd1"} <= {target for target, _ in imported_modules("families")}


def test_every_module_has_a_floor() -> None:
    assert sorted(FLOORS) == sorted(MODULES)


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module: str) -> None:
    for target, line in imported_modules(module):
        assert target in MODULES, f"{module}:{line} imports {target}, which does not exist"
        assert FLOORS[target] <= FLOORS[module], f"{module}:{line} imports {target} from a floor above"


def test_imports_make_no_circle() -> None:
    graph = {module: sorted({target for target, _ in imported_modules(module)}) for module in MODULES}
    finished: set[str] = set()

    def walk(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"circle: {' → '.join([*path, module])}"
        if module in finished:
            return
        for target in graph[module]:
            walk(target, (*path, module))
        finished.add(module)

    for module in MODULES:
        walk(module, ())


@pytest.mark.parametrize("module", MODULES)
def test_the_engine_knows_no_host(module: str) -> None:
    for statement in imports_of(MODULES[module]):
        where = f"{module}:{statement.line} imports {statement.module}"
        if statement.module.startswith("."):
            continue
        assert statement.top not in {"trainer", "pack", "tests", "demo"}, f"{where}: only relative imports of itself"
        assert statement.top not in HOSTS | UNTRUSTED, where
        assert not statement.top.startswith("comfy"), where


@pytest.mark.parametrize("module", MODULES)
def test_heavy_libraries_wait_until_they_are_needed(module: str) -> None:
    for statement in imports_of(MODULES[module]):
        assert not (statement.at_module_level and statement.top in HEAVY), f"{module}:{statement.line}"


@pytest.mark.parametrize("path", python_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_too_long(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    length = len(text.splitlines())
    assert length <= MAX_FILE
    limit = MAX_RECIPE_FUNCTION if path == TRAINER / "dreambooth.py" else MAX_FUNCTION
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            assert lines <= limit, f"{node.name} (line {node.lineno}) has {lines} lines"


@pytest.mark.parametrize(
    "what",
    ["", "trainer.config", "trainer.flags", "trainer.__main__"],
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
