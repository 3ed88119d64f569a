"""Mutation testing of the pure core: break one thing in a module, run the tests that belong to it, list what none saw.

    python tools/mutate.py                                  every mutant of every module: an hour or two
    python tools/mutate.py merging/methods --sample 60      sixty of one module's, the same each time
    python tools/mutate.py merging/methods --lines 88,93    those of two lines, once there are tests for them

The mutants are mutmut's: its operators, on libcst's tree. mutmut itself tells mutants apart by the names of modules,
which here are the host's. So one process imports torch and the other libraries, and forks for each mutant; the fork
imports the pack with the mutated source in place of the file's, and runs the module's everyday tests until one fails:
those first that saw a fault before.

Survivors that were looked at stand in tests/mutants.toml with a verdict. Others make the exit status 1.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import gc
import importlib
import importlib.util
import os
import random
import resource
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from types import CodeType

ROOT = Path(__file__).resolve().parents[1]
KNOWN = ROOT / "tests" / "mutants.toml"
LIBRARIES = ["torch", "numpy", "PIL", "safetensors.torch", "pydantic", "hypothesis", "pytest"]
LIBRARIES += ["diffusers", "transformers", "peft", "accelerate"]
_NOT_IMPORTED = 70  # exit status of tests that passed without the module
_FIRST = 24  # tests that are run before the others
_MEMORY_BYTES = 8 * 2**30  # of address space; a fault may ask for any amount
NOT_SLOW = "not slow and not comfy and not webui and not browser and not gpu"
_ADAPTERS = ["tests/adapters/test_layers.py", "tests/merging/test_methods.py", "tests/merging/test_merge.py"]
_ADAPTERS += ["tests/adapters/test_foreign_files.py"]
_FILES = ["tests/adapters/test_layers.py", "tests/adapters/test_casting.py", "tests/adapters/test_outside_data.py"]
_FILES += ["tests/adapters/test_foreign_files.py", "tests/adapters/test_kohya.py"]
_MERGING = ["tests/merging/test_methods.py", "tests/merging/test_merge.py"]
TESTS: dict[str, list[str]] = {
    "merging/methods": _MERGING,
    "merging/deltas": ["tests/merging/test_merge_parts.py", *_MERGING, "tests/merging/test_finite.py"],
    "merging/merge": [
        "tests/merging/test_merge_parts.py",
        "tests/merging/test_merge.py",
        "tests/merging/test_finite.py",
    ],
    "models/objective": ["tests/models/test_objectives.py"],
    "core/seeding": ["tests/core/test_seeding.py", "tests/models/test_objectives.py"],
    "adapters/kohya": _FILES,
    **{f"adapters/layers/{name}": _ADAPTERS for name in ("__init__", "base", "full", "loha", "lokr", "lora", "oft")},
    "data/buckets": ["tests/dreambooth/test_buckets.py"],
}


@dataclass(frozen=True)
class Mutant:
    """A module's source with one fault.

    Attributes:
        line: Where the fault is, from 1.
        was: The lines that differ, stripped.
        now: The same lines with the fault.
        source: The whole module's.
    """

    line: int
    was: str
    now: str
    source: str


def mutants_of(source: str) -> list[Mutant]:
    """Every mutant of a module that tests can be asked to see, in the order of the source."""
    import libcst

    module = libcst.parse_module(source)
    found: dict[str, Mutant] = {}
    for node, mutated in _mutated_nodes(module):
        code = module.deep_replace(node, mutated).code  # type: ignore[arg-type]
        if code != source and code not in found:
            compile(code, "mutant", "exec")
            found[code] = _as_mutant(source, code)
    return sorted(found.values(), key=lambda mutant: mutant.line)


def _mutated_nodes(module: object) -> Iterator[tuple[object, object]]:
    """Nodes of the tree, each with what takes its place: mutmut's operators, and conditions turned round."""
    import libcst as cst
    from libcst import matchers
    from mutmut.mutation import mutators

    unseen = [
        matchers.Call(matchers.Attribute(matchers.Name("logger") | matchers.Name("logging"))),
        matchers.Expr(matchers.SimpleString() | matchers.ConcatenatedString()),  # docstrings
        matchers.Assign([matchers.AssignTarget(matchers.Name("__all__"))]),
    ]
    skipped = (cst.Annotation, cst.Decorator, cst.Import, cst.ImportFrom, cst.Raise, cst.Assert)
    left_out = {mutators.operator_assignment, mutators.operator_arg_removal, mutators.operator_string}
    operators = [(kind, operator) for kind, operator in mutators.mutation_operators if operator not in left_out]
    stack: list[cst.CSTNode] = [module]  # type: ignore[list-item]
    while stack:
        node = stack.pop()
        if isinstance(node, skipped) or any(matchers.matches(node, pattern) for pattern in unseen):
            continue
        stack += reversed(node.children)
        for kind, operator in operators:
            if isinstance(node, kind):
                yield from ((node, mutated) for mutated in operator(node))
        if isinstance(node, cst.SimpleString) and " " not in node.value:  # a name or a key rather than prose
            yield from ((node, mutated) for mutated in list(mutators.operator_string(node))[:1])
        if isinstance(node, cst.Call):  # without one of its keywords
            for index, argument in enumerate(node.args):
                if argument.keyword:
                    yield node, node.with_changes(args=[*node.args[:index], *node.args[index + 1 :]])
        if isinstance(node, cst.If):
            condition = node.test.with_changes(lpar=[cst.LeftParen()], rpar=[cst.RightParen()])
            yield node, node.with_changes(test=cst.UnaryOperation(cst.Not(), condition))


def _as_mutant(source: str, code: str) -> Mutant:
    before, after = source.splitlines(), code.splitlines()
    changes = [
        change for change in difflib.SequenceMatcher(None, before, after, False).get_opcodes() if change[0] != "equal"
    ]
    first, last = changes[0], changes[-1]
    was, now = before[first[1] : last[2]], after[first[3] : last[4]]
    return Mutant(first[1] + 1, *("\n".join(line.strip() for line in lines) for lines in (was, now)), code)


class _Mutated(MetaPathFinder):
    """Finds one module, with another source than its file has."""

    def __init__(self, module: str, source: str) -> None:
        self._name = "pack.trainer." + module.removesuffix("/__init__").replace("/", ".")
        self._path = str(ROOT / "trainer" / f"{module}.py")
        self._source = source

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        """See `MetaPathFinder`."""
        if name != self._name:
            return None
        loader = _Loader(name, self._path)
        loader.source = self._source
        return importlib.util.spec_from_file_location(name, self._path, loader=loader)


class _Loader(SourceFileLoader):
    source: str
    was_used = False

    def get_code(self, fullname: str) -> CodeType:
        _Loader.was_used = True
        return compile(self.source, self.path, "exec")


class _Failures:
    """A plugin of pytest: writes down which test fails."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def pytest_runtest_logreport(self, report: object) -> None:
        """See pytest's hooks."""
        if getattr(report, "failed", False):
            self._file.write_text(report.nodeid, "utf-8")  # type: ignore[attr-defined]


def start(
    module: str, source: str, tests: Sequence[str], scratch: Path, cpu_limit_s: int, first: Sequence[str] = ()
) -> int:
    """Fork a process that runs tests with a module of that source; it ends with 0 if all pass. Returns its id.

    Nothing of the pack is imported before, so constants of the source and what others import of it are the fork's own.

    Args:
        module: The module, as in `TESTS`.
        source: Its source.
        tests: Files of tests.
        scratch: A folder for its output ("<id>.log"), which test failed ("<id>.failed"), the libraries that it imported
            ("<id>.modules") and the tests' files.
        cpu_limit_s: CPU seconds after which it is ended.
        first: Single tests of those files to be run before the others.
    """
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        resource.setrlimit(resource.RLIMIT_CPU, (cpu_limit_s, cpu_limit_s + 10))
        with contextlib.suppress(ValueError, OSError):  # not on every system
            resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
        for stream in (1, 2):
            os.dup2(os.open(scratch / f"{os.getpid()}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
        sys.meta_path.insert(0, _Mutated(module, source))
        import pytest

        options = ["-x", "-q", "-m", NOT_SLOW, "-p", "no:cacheprovider", "--tb=line"]
        options.append(f"--basetemp={scratch / str(os.getpid())}")
        failures = _Failures(scratch / f"{os.getpid()}.failed")
        status = int(pytest.main([*options, *first], [failures])) if first else 0
        if status != pytest.ExitCode.TESTS_FAILED:
            for test in tests:  # file by file, so that most faults are seen before the others are collected
                status = int(pytest.main([*options, test], [failures]))
                if status:
                    break
        if status == 0 and not _Loader.was_used:
            status = _NOT_IMPORTED
        (scratch / f"{os.getpid()}.modules").write_text("\n".join(_libraries_of_this_process()), "utf-8")
    finally:
        os._exit(status)


def _libraries_of_this_process() -> list[str]:
    """The modules outside the repository that were imported, in the order of their import."""
    files = {name: getattr(module, "__file__", None) for name, module in list(sys.modules.items())}
    return [name for name, file in files.items() if file and "site-packages" in file]


def finished(scratch: Path) -> tuple[int, int, float]:
    """Wait for one of the processes: its id, its exit status (negative for a signal), the CPU seconds that it took."""
    process, status, usage = os.wait3(0)
    shutil.rmtree(scratch / str(process), ignore_errors=True)
    return process, os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime


def survivors_of(module: str, mutants: Sequence[Mutant], tests: Sequence[str], jobs: int) -> Iterator[Mutant]:
    """The mutants that no test sees, as they are found."""
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        unchanged = (ROOT / "trainer" / f"{module}.py").read_text("utf-8")
        baseline = start(module, unchanged, tests, scratch, 600)
        _, status, seconds = finished(scratch)
        if status == _NOT_IMPORTED:
            sys.exit(f"{module}: its tests do not import it")
        if status:
            log = (scratch / f"{baseline}.log").read_text("utf-8")
            sys.exit(f"{log[-3000:]}\n{module}: its tests fail without a fault")
        for name in (scratch / f"{baseline}.modules").read_text("utf-8").splitlines():
            with contextlib.suppress(Exception):  # it is but imported sooner, for all mutants at once
                importlib.import_module(name)
        gc.freeze()
        running: dict[int, Mutant] = {}
        waiting = list(mutants)
        telling: list[str] = []  # the tests that saw a fault, the last first: they are likely to see the next
        while waiting or running:
            while waiting and len(running) < jobs:
                mutant = waiting.pop(0)
                limit_s = int(3 * seconds) + 20
                running[start(module, mutant.source, tests, scratch, limit_s, telling[:_FIRST])] = mutant
            process, status, _ = finished(scratch)
            mutant = running.pop(process)
            if not status:
                yield mutant
            failed = scratch / f"{process}.failed"
            if failed.exists():
                name = failed.read_text("utf-8")
                telling = [name, *(other for other in telling if other != name)]


def known_survivors() -> dict[tuple[str, str, str], str]:
    """(module, was, now) → verdict, of tests/mutants.toml."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib

    entries = tomllib.loads(KNOWN.read_text("utf-8")).get("survivor", []) if KNOWN.exists() else []
    return {(entry["module"], entry["was"], entry["now"]): entry["verdict"] for entry in entries}


def lines_of(text: str) -> set[int]:
    """The numbers of "12,40-44"."""
    lines: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        lines |= set(range(int(first), int(last or first) + 1))
    return lines


def main() -> int:
    """Run the command; 1 if a mutant survives that nobody has looked at."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("modules", nargs="*", metavar="MODULE", help=f"of trainer/: {', '.join(TESTS)}; without, all")
    parser.add_argument("--sample", type=int, default=0, help="at most so many mutants of each module; 0: all")
    parser.add_argument("--lines", type=lines_of, help="only those of these lines of the module, such as 12,40-44")
    parser.add_argument("--jobs", type=int, default=1, help="how many run at once")
    parser.add_argument("--list", action="store_true", help="list the mutants, run nothing")
    options = parser.parse_args()
    modules = options.modules or list(TESTS)
    if unknown := set(modules) - set(TESTS):
        parser.error(f"no tests are named for {', '.join(sorted(unknown))}")
    os.chdir(ROOT)
    os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", HF_HUB_OFFLINE="1")
    if not options.list:
        for library in LIBRARIES:
            importlib.import_module(library)
        gc.freeze()
    known, is_news = known_survivors(), False
    for module in modules:
        every = mutants_of((ROOT / "trainer" / f"{module}.py").read_text("utf-8"))
        gone = {entry for entry in known if entry[0] == module} - {(module, one.was, one.now) for one in every}
        for _, was, now in sorted(gone):
            show("tests/mutants.toml: there is no such mutant", was, now)
        chosen = [mutant for mutant in every if options.lines is None or mutant.line in options.lines]
        if 0 < options.sample < len(chosen):
            chosen = sorted(random.Random(module).sample(chosen, options.sample), key=lambda mutant: mutant.line)
        survivors, news = 0, 0
        with_verdict = {(mutant.was, mutant.now) for mutant in chosen if (module, mutant.was, mutant.now) in known}
        for mutant in chosen if options.list else survivors_of(module, chosen, TESTS[module], options.jobs):
            survivors += 1
            with_verdict.discard((mutant.was, mutant.now))
            if (module, mutant.was, mutant.now) not in known:
                news += 1
                show(f"trainer/{module}.py:{mutant.line}", mutant.was, mutant.now)
        if not options.list:
            for was, now in sorted(with_verdict):
                show("tests/mutants.toml: a test sees this mutant", was, now)
            is_news |= news > 0
            counts = f"{len(every)} mutants, {len(chosen)} run, {len(chosen) - survivors} seen, {survivors} survive"
            print(f"{module}: {counts}, {survivors - news} of them with a verdict", flush=True)
    return int(is_news)


def show(title: str, was: str, now: str) -> None:
    """Print a mutant as a difference."""
    lines = [title, *(f"- {line}" for line in was.splitlines()), *(f"+ {line}" for line in now.splitlines())]
    print(*lines, sep="\n    ", flush=True)


if __name__ == "__main__":
    sys.exit(main())
