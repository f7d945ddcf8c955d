"""Rows of a data set on the Hugging Face hub, read by `datasets` (which runs no code of the data set)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dayzero.console import log
from dayzero.data.rows import PaddedRow, Row
from dayzero.data.sources import Fetched, card_licence, hub_commit, unreachable
from dayzero.data.store_entry import Memory
from dayzero.errors import ConfigError, DataError
from dayzero.source import Source


def load(
    source: Source, key: str, subset: str | None, split: str, memory: Memory, streaming: bool = False
) -> tuple[Fetched, Iterator[tuple[str, Row]]]:
    """The data set at the commit its revision means now, and its rows as (origin, row).

    `streaming`: only what is read comes over the network, and nothing of it stays on this disk; the rows are the same.
    Raises ConfigError when it, its subset or its split does not exist, when it is a script, which is never run, or when
    the hub cannot be reached.
    """
    commit, info = hub_commit(source, "dataset", key)
    moved = memory.moved_from(source.text, commit, source.pinned)
    log.info("%s is at commit %s%s", source.text, commit, ", streamed" if streaming else "")
    files = [sibling.rfilename for sibling in info.siblings or []]
    script = f"{source.name.rpartition('/')[2]}.py"
    if script in files:
        raise ConfigError(
            f"{key}: {source.text} is a script ({script}), which is never run: use its Parquet export, "
            f"`hf:{source.name}@refs/convert/parquet`, or its files"
        )

    import datasets

    with _errors(source, key):
        rows = datasets.load_dataset(source.name, subset, split=split, revision=commit, streaming=streaming)
    fetched = Fetched(source, Path(), None, commit, card_licence(info.card_data), moved)
    return fetched, _rows(rows, source, key)


def _rows(rows: Any, source: Source, key: str) -> Iterator[tuple[str, Row]]:
    with _errors(source, key):
        for number, row in enumerate(rows, 1):
            yield f"{source.name}:{number}", PaddedRow(row)


@contextmanager
def _errors(source: Source, key: str) -> Iterator[None]:
    import datasets

    try:
        yield
    except ConnectionError as error:
        raise unreachable(source, key, error) from error
    except (datasets.exceptions.DatasetsError, FileNotFoundError) as error:
        raise ConfigError(f"{key}: {source.text}: {' '.join(str(error).split())[:200]}") from error
    except ValueError as error:  # unknown subset or split: the message lists those there are
        if isinstance(error, ConfigError | DataError):
            raise
        raise ConfigError(
            f"{key}: {source.text}: {' '.join(str(error).split())}: see data.subset, data.split"
        ) from error
