"""What `install.py` does in a web UI: nothing to the host, and an environment of the pack's own where it must."""

from __future__ import annotations

import json
import os
import sys
import sysconfig
from importlib.metadata import version
from pathlib import Path

import pytest
from helpers import ROOT
from make_webui_settings import content
from pack import install

REQUIREMENTS = "peft>=0.13\nsafetensors>=0.4.2\n"
unix = pytest.mark.skipif(os.name == "nt", reason="Python's place is taken by a script of a shell")


def test_the_tab_s_settings_are_those_of_the_engine() -> None:
    """python tools/make_webui_settings.py writes them anew."""
    assert (ROOT / "webui" / "settings.json").read_text(encoding="utf-8") == content()


def test_web_uis_are_known_by_their_folder(tmp_path: Path) -> None:
    assert not install.is_in_web_ui(tmp_path)
    (tmp_path / "modules").mkdir()
    assert not install.is_in_web_ui(tmp_path)
    (tmp_path / "launch.py").touch()
    assert install.is_in_web_ui(tmp_path)


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pip: str) -> Path:
    """A host's Python whose new environments have a Python that does this; the environment's folder."""
    folder = tmp_path / "extension" / "venv"
    inside = script(tmp_path / "inside", f'echo "$@" > "{tmp_path}/words"; env > "{tmp_path}/variables"; {pip}')
    lib = sysconfig.get_path("purelib", "posix_prefix", {"base": "$3", "platbase": "$3"})
    made = f'[ "$1 $2" = "-m venv" ] && mkdir -p "$3/bin" "{lib}" && cp "{inside}" "$3/bin/python"'
    monkeypatch.setattr(sys, "executable", str(script(tmp_path / "python", made)))
    return folder


@unix
def test_an_environment_over_the_host_s_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = host(tmp_path, monkeypatch, "exit 0")
    (folder / "lib").mkdir(parents=True)
    (folder / "lib" / "old").touch()
    monkeypatch.setenv("PYTHONPATH", "/host")
    assert not install.is_ready(REQUIREMENTS, folder)
    assert install.make_environment(REQUIREMENTS, folder) == ""
    assert not (folder / "lib" / "old").exists(), "what was there is gone"
    [lent] = folder.rglob("*.pth")
    assert lent.read_text(encoding="utf-8").splitlines() == [sysconfig.get_path("purelib")]
    constraint = (folder / "host.txt").read_text(encoding="utf-8")
    assert constraint == f"torch=={version('torch')}\n", "the host's PyTorch stays"
    words = (tmp_path / "words").read_text(encoding="utf-8").strip()
    assert words == (
        f"-m pip install --disable-pip-version-check -c {folder / 'host.txt'} peft>=0.13 safetensors>=0.4.2"
    )
    assert "PYTHONPATH" not in (tmp_path / "variables").read_text(encoding="utf-8")
    assert install.is_ready(REQUIREMENTS, folder)


@unix
def test_it_is_made_anew_when_what_it_was_made_for_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = host(tmp_path, monkeypatch, "exit 0")
    install.make_environment(REQUIREMENTS, folder)
    assert install.is_ready(REQUIREMENTS, folder)
    assert not install.is_ready(REQUIREMENTS + "diffusers\n", folder)
    stamp = json.loads((folder / "dreambooth_lora.json").read_text(encoding="utf-8"))
    assert stamp.keys() == {"python", "torch", "host", "requirements"}
    for name in stamp:
        (folder / "dreambooth_lora.json").write_text(json.dumps(stamp | {name: "another"}))
        assert not install.is_ready(REQUIREMENTS, folder), name
    for damaged in ("", "{", "[]"):
        (folder / "dreambooth_lora.json").write_text(damaged)
        assert not install.is_ready(REQUIREMENTS, folder), damaged
    (folder / "dreambooth_lora.json").write_text(json.dumps(stamp))
    assert install.is_ready(REQUIREMENTS, folder)
    install.environment_python(folder).unlink()
    assert not install.is_ready(REQUIREMENTS, folder)


@unix
def test_a_host_without_venv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line with the way out, and nothing half made."""
    python = script(tmp_path / "python", 'mkdir -p "$3/lib"; echo "$0: No module named venv" >&2; exit 1')
    monkeypatch.setattr(sys, "executable", str(python))
    failure = install.make_environment(REQUIREMENTS, tmp_path / "venv")
    assert failure == (
        f"The extension's Python environment can't be created in {tmp_path / 'venv'} with {python}: {python}: No "
        "module named venv. Install Python's 'venv' (on Debian and Ubuntu: apt install python3-venv) and restart. The "
        "web UI itself still works; only training does not."
    )
    assert not (tmp_path / "venv").exists()


@unix
def test_packages_that_can_not_be_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = host(tmp_path, monkeypatch, "echo Looking; echo 'ERROR: No matching distribution' >&2; echo More; exit 1")
    failure = install.make_environment(REQUIREMENTS, folder)
    assert failure == (
        "The packages for training can't be installed: ERROR: No matching distribution. Restart to try again. "
        "The web UI itself still works; only training does not."
    )
    assert not install.is_ready(REQUIREMENTS, folder)


def test_a_folder_that_can_not_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    failure = install.make_environment(REQUIREMENTS, tmp_path / "file" / "venv")
    assert str(tmp_path / "file" / "venv") in failure
    assert "write permission there" in failure
    assert "'venv'" not in failure, "Python is not at fault"
    assert "\n" not in failure


@unix
def test_a_disk_that_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = script(tmp_path / "python", "echo 'Error: [Errno 28] No space left on device' >&2; exit 1")
    monkeypatch.setattr(sys, "executable", str(python))
    failure = install.make_environment(REQUIREMENTS, tmp_path / "venv")
    assert failure == (
        f"The extension's Python environment can't be created in {tmp_path / 'venv'} with {python}: Error: [Errno 28] "
        "No space left on device. Give the web UI's user write permission there, or free some space on that disk, and "
        "restart. The web UI itself still works; only training does not."
    )


def in_web_ui(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "web ui" / "modules").mkdir(parents=True)
    (tmp_path / "web ui" / "launch.py").touch()
    monkeypatch.chdir(tmp_path / "web ui")

    def none(*_: object) -> None:
        raise AssertionError("the host's packages are not changed")

    monkeypatch.setattr(install, "replace_incompatible_packages", none)


def test_a_host_whose_packages_will_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    in_web_ui(tmp_path, monkeypatch)
    monkeypatch.setattr(install, "missing_requirements", lambda text: [])
    install.main()
    assert "trains with the web UI's own packages" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "web ui").rglob("*")} == {"modules", "launch.py"}


def test_a_host_whose_packages_will_not_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    in_web_ui(tmp_path, monkeypatch)
    monkeypatch.setattr(install, "missing_requirements", lambda text: ["pydantic is 1.10"])
    for is_ready, failure, said in (
        (True, "", ["trains with its own packages"]),
        (False, "", ["Creating a Python environment", "trains with its own packages"]),
        (False, "No room.", ["Creating a Python environment", "No room."]),
    ):
        monkeypatch.setattr(install, "is_ready", lambda text, is_ready=is_ready: is_ready)
        monkeypatch.setattr(install, "make_environment", lambda text, failure=failure: failure)
        install.main()
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == len(said)
        assert all(part in line for part, line in zip(said, lines)), lines
