"""What a setting needs of the machine, an NVIDIA GPU or a package: refused in one line, before anything is started."""

from __future__ import annotations

import importlib.util

import torch

from dayzero.errors import ConfigError


def has_nvidia_gpu() -> bool:
    """Whether torch can use one here."""
    return torch.cuda.is_available() and torch.version.cuda is not None


def gpu_and_package_lacking(package: str) -> str | None:
    """What this machine lacks of an NVIDIA GPU and `package`, as pip knows it; None where it has both."""
    missing = [] if has_nvidia_gpu() else ["this machine has no NVIDIA GPU that torch can use"]
    if not _installed(package):
        missing.append(f"the package is not installed (pip install {package})")
    return " and ".join(missing) or None


def require_gpu_and_package(setting: str, package: str, remedy: str) -> None:
    """Raise `ConfigError` where one of the two is missing."""
    if missing := gpu_and_package_lacking(package):
        raise ConfigError(f"{setting} needs an NVIDIA GPU and the package {package}, but {missing}: {remedy}")


def require_package(setting: str, package: str, remedy: str) -> None:
    """Raise `ConfigError` where it is not installed."""
    if not _installed(package):
        raise ConfigError(f"{setting} needs the package {package}: pip install {package}, or {remedy}")


def _installed(package: str) -> bool:
    module = package.partition("[")[0].replace("-", "_")
    return importlib.util.find_spec(module) is not None
