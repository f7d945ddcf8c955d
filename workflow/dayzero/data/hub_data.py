"""Rows of a data set on the Hugging Face hub, read by `datasets` (which runs no code of the data set)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from dayzero.console import log
from dayzero.data.readers import Row
from dayzero.data.sources import Fetched, Source, card_licence, hub_commit, unreachable
from dayzero.data.store_entry import Memory
from dayzero.errors import ConfigError


def load(
    source: Source, key: str, subset: str | None, split: str, memory: Memory
) -> tuple[Fetched, Iterator[tuple[str, Row]]]:
    """The data set at the commit its revision means now, and its rows as (origin, row).

    Raises ConfigError when it, its subset or its split does not exist, or the hub cannot be reached.
    """
    commit, info = hub_commit(source, "dataset", key)
    moved = memory.moved_from(source.text, commit, source.pinned)
    log.info("%s is at commit %s", source.text, commit)

    import datasets

    try:
        rows = datasets.load_dataset(source.name, subset, split=split, revision=commit)
    except ValueError as error:  # unknown subset or split: the message lists those there are
        raise ConfigError(
            f"{key}: {source.text}: {' '.join(str(error).split())}: see data.subset, data.split"
        ) from error
    except (datasets.exceptions.DatasetsError, FileNotFoundError) as error:
        raise ConfigError(f"{key}: {source.text}: {' '.join(str(error).split())[:200]}") from error
    except ConnectionError as error:
        raise unreachable(source, key, error) from error
    fetched = Fetched(source, Path(), None, commit, card_licence(info), moved)
    return fetched, ((f"{source.name}:{number}", row) for number, row in enumerate(rows, 1))
