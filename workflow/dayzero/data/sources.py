"""Bringing the files of a source here, and what is known of them: hashes, the hub's commit, the licence."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from dayzero.console import log
from dayzero.data.packages import download_package, extract, package_licence
from dayzero.data.store_entry import Memory
from dayzero.errors import ConfigError, DataError, short
from dayzero.files import sha256_file, sha256_json
from dayzero.source import FORMS, Source, files_below, is_pattern, local_path, matches, partner


@dataclass(frozen=True)
class Fetched:
    """A source on this disk: a file, or a directory of files (`sha256` is then of its names and hashes)."""

    source: Source
    path: Path
    sha256: str | None
    revision: str | None = None
    licence: str | None = None
    moved_from: str | None = None

    def record(self) -> dict[str, Any]:
        """What a manifest says about it."""
        record = {k: getattr(self, k) for k in ("revision", "sha256", "licence")}
        moved = {"moved_from": self.moved_from} if self.moved_from else {}
        return {"source": self.source.text, **record, **moved}

    @property
    def label(self) -> str:
        """How its rows and files are named in messages and in `origin`: by their whole path in a package, too, of which
        what a glob collects has the rest."""
        inside = f"/{self.source.inside}"
        of_package = self.source.kind == "package" and self.path.as_posix().endswith(inside)
        return self.source.name + (inside if of_package else "")


def fetch_files(source: Source, key: str, workspace: Path, memory: Memory, sha256: str | None = None) -> Fetched:
    """Bring a local or package source's files here, check them against a pinned `sha256` and note their hash.

    Raises ConfigError when there is no such file or its hash is another one, DataError for a broken archive.
    """
    fetched = locate(source, key, workspace)
    found = _sha256(fetched.path, source.text)
    check_sha256(source.text, found, sha256, key.partition(".")[0])
    moved = memory.moved_from(source.text, found, pinned=sha256 is not None)
    return replace(fetched, sha256=found, moved_from=moved)


def locate(source: Source, key: str, workspace: Path) -> Fetched:
    """Bring a local or package source's files here without hashing them; raises as `fetch_files` does."""
    if source.kind == "package":
        return _from_package(source, key, workspace)
    return Fetched(source, _local(source, key, workspace), None)


def check_sha256(name: str, found: str | None, expected: str | None, section: str) -> None:
    """Raise ConfigError when a pinned hash is not the one found."""
    if expected is None or (found or "").lower() == expected.lower():
        return
    raise ConfigError(
        f"{section}.sha256: {name} has {found or 'no sha256 (pin its revision instead)'}, expected {expected}: "
        f"the file changed or is damaged; fetch it again, or set {section}.sha256 to the new value if you trust it"
    )


def hub_commit(source: Source, repo_type: Literal["model", "dataset"], key: str) -> tuple[str, Any]:
    """The commit that a hub source's revision means now, and the hub's description of it (files, card).

    Raises ConfigError when the repository or revision does not exist, is closed, or the hub cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        info = HfApi().repo_info(source.name, repo_type=repo_type, revision=source.revision)
    except GatedRepoError as error:
        raise ConfigError(
            f"{key}: {source.text} asks for consent on the hub: accept its terms there, then set HF_TOKEN"
        ) from error
    except RevisionNotFoundError as error:
        raise ConfigError(
            f"{key}: {source.name} has no revision {source.revision!r} on the hub: name a branch, tag or commit"
        ) from error
    except RepositoryNotFoundError as error:
        raise ConfigError(
            f"{key}: the hub has no {repo_type} {source.name!r}: check the name, and HF_TOKEN if it is private"
        ) from error
    except HFValidationError as error:
        raise ConfigError(f"{key}: {source.text!r} is no name on the hub ({error}): write `hf:org/name`") from error
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError) as error:
        raise unreachable(source, key, error) from error
    except Exception as error:  # the HTTP client's own errors, whichever client huggingface_hub uses
        if "Connect" in type(error).__name__ or "Timeout" in type(error).__name__:
            raise unreachable(source, key, error) from error
        raise
    assert info.sha, "the hub names the commit of every revision"
    return info.sha, info


def unreachable(source: Source, key: str, error: Exception) -> ConfigError:
    """The one line for a hub that does not answer."""
    said = short(error)
    return ConfigError(
        f"{key}: cannot reach the hub for {source.text} ({said}): check the network, or give a local path"
    )


def card_licence(card: Any) -> str | None:
    """The licence in what a model's or data set's card says (a mapping, or None); None when it names none."""
    licence = card.get("license") if card else None
    return ", ".join(map(str, licence)) if isinstance(licence, list) else licence and str(licence)


def _from_package(source: Source, key: str, workspace: Path) -> Fetched:
    folder = workspace / re.sub(r"[^\w.-]+", "-", source.name)
    archive = download_package(source.name, folder / "archive", key)
    # each source unpacks into a folder of its own: a glob must not see what another one left
    target = folder / sha256_json(source.inside)[:8]
    path = extract(archive, source.inside, target, key)
    return Fetched(source, path, None, source.revision, package_licence(archive))


def _local(source: Source, key: str, workspace: Path) -> Path:
    path = local_path(source.text)
    assert path is not None
    if path.is_file() and (other := partner(path)) and other.is_file():
        folder = workspace / f"pair-{sha256_json(source.name)[:8]}"  # Megatron's two files are one data set
        folder.mkdir(parents=True, exist_ok=True)
        for file in (path, other):
            link = folder / file.name
            if not link.is_symlink():
                link.symlink_to(file.resolve())
        return folder
    if path.exists():
        return path
    if is_pattern(source.name):
        files = matches(path)
        if not files:
            raise ConfigError(f"{key}: no file matches {source.name!r} (looked from {Path.cwd()}): correct the glob")
        folder = workspace / f"glob-{sha256_json(source.name)[:8]}"
        for file in files:
            link = folder.joinpath(*(part for part in file.parts if part not in ("..", file.anchor)))
            link.parent.mkdir(parents=True, exist_ok=True)
            if not link.is_symlink():
                link.symlink_to(file.resolve())
        return folder
    siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, siblings, n=1)
    hint = f" (did you mean {path.with_name(close[0])}?)" if close else ""
    raise ConfigError(f"{key}: {source.text!r} does not exist{hint}: give {FORMS}")


def _sha256(path: Path, text: str) -> str:
    if path.is_file():
        return sha256_file(path)
    files = {str(p.relative_to(path)): sha256_file(p) for p in files_below(path) if p.is_file()}
    if not files:
        raise DataError(f"{text}: the directory holds no files")
    log.info("%s: %d files", text, len(files))
    return sha256_json(files)
