"""What the rows of a data set are like, and how much of the evaluation's items stands in the training rows.

Memory does not grow with the rows: what is known of each is sorted on disk, and what is costly is looked at for a share
of them that hashes of their texts choose, so that the choice does not depend on the order of rows.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import py3langid
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from dayzero.config import DataCheck
from dayzero.console import ProgressBar, log
from dayzero.data import near_duplicates
from dayzero.data.histogram import LengthHistogram
from dayzero.data.near_duplicates import NearDuplicates
from dayzero.data.ngrams import Words, words
from dayzero.data.spill import Spill, first_of_groups
from dayzero.data.stored_table import batch_rows, open_table, row_origins, table_bytes
from dayzero.errors import DataError

BATCH_ROWS, BATCH_BYTES = 512, 2**20
"""Rows looked at together: so many, or fewer long ones."""
LANGUAGE_ROWS, LANGUAGE_CHARS = 1000, 2000
"""Rows, and characters of each, whose language is told."""
SHORTEST = 5
"""Words of the shortest items that are looked for; fewer stand in many rows by chance."""
EXAMPLES = 5
"""Contaminated items of a task that the report names."""
TEXTS = ("text", "prompt_completion", "messages")
"""The kinds of rows that are looked at: those made of text."""


CALLS = ("reasoning_content", "tool_calls")
"""What a message may hold besides its content, as text or JSON text."""


def row_texts(batch: pa.RecordBatch, kind: str) -> pa.Array:
    """All text of each row, of calls and of tools too."""
    if kind == "text":
        return pc.fill_null(batch.column("text"), "")
    if kind == "prompt_completion":
        return pc.binary_join_element_wise(*(pc.fill_null(batch.column(c), "") for c in ("prompt", "completion")), "\n")
    lists, messages = batch.column("messages"), batch.column("messages").flatten()
    ends = np.concatenate([[0], np.cumsum(pc.fill_null(pc.list_value_length(lists), 0))]).astype(np.int32)
    fields = {field.name for field in messages.type}
    said = [pc.fill_null(messages.field("content"), ""), *(messages.field(name) for name in CALLS if name in fields)]
    texts = pc.binary_join_element_wise(*said, "\n", null_handling="skip")
    joined = pc.binary_join(pa.ListArray.from_arrays(ends, texts), "\n")
    tools = [batch.column("tools")] if "tools" in batch.schema.names else []
    return pc.binary_join_element_wise(joined, *tools, "\n", null_handling="skip")


def questions(batch: pa.RecordBatch, kind: str) -> list[str]:
    """What each row asks: its `question` where it has one, else the prompt, the users' turns, or the text itself."""
    if "question" in batch.schema.names:
        return [text or "" for text in batch.column("question").to_pylist()]
    if kind == "messages":
        rows = batch.column("messages").to_pylist()
        return ["\n".join(m["content"] or "" for m in row if m["role"] == "user") for row in rows]
    return [text or "" for text in batch.column("text" if kind == "text" else "prompt").to_pylist()]


def empty_answers(batch: pa.RecordBatch, kind: str) -> int:
    """Rows with a blank text, completion or assistant turn (one that holds nothing else either, such as a call)."""
    if kind != "messages":
        return int(pc.sum(_blank(batch.column("text" if kind == "text" else "completion"))).as_py() or 0)
    empty = 0
    for row in batch.column("messages").to_pylist():
        answers = [m for m in row if m["role"] == "assistant"]
        empty += any(not any(str(v).strip() for k, v in m.items() if k != "role" and v) for m in answers)
    return empty


def _blank(texts: pa.Array) -> pa.Array:
    return pc.equal(pc.utf8_length(pc.utf8_trim_whitespace(pc.fill_null(texts, ""))), 0)


@dataclass
class Contamination:
    """Which n-grams of the items stand in the training rows; see `DataCheck` for what counts as contaminated.

    An item of fewer than n words, but SHORTEST or more, is its only one.
    """

    items: Mapping[str, Sequence[str]]
    """Task -> the question of each of its items."""
    n: int
    overlap: float

    def __post_init__(self) -> None:
        flat = [text for texts in self.items.values() for text in texts]
        found = words(pa.array(flat, pa.string()))
        lengths = np.bincount(found.text, minlength=len(flat))
        whole = np.unique(lengths[(lengths >= SHORTEST) & (lengths < self.n)]).tolist()
        self._lengths = [self.n, *whole]  # of the runs that are looked for
        parts = [found.ngrams(self.n)]
        for length in whole:
            grams, owner = found.ngrams(length)
            parts.append((grams[lengths[owner] == length], owner[lengths[owner] == length]))
        self._grams, place = np.unique(np.concatenate([grams for grams, _ in parts]), return_inverse=True)
        owners = np.concatenate([owner for _, owner in parts])
        pairs = np.unique(np.stack([owners, place]), axis=1)  # an n-gram counts once in an item
        self._owner, self._place = pairs
        self._row = np.full(len(self._grams), -1)  # the first training row that holds each n-gram

    def see(self, rows: Words, first_row: int) -> None:
        """Look at training rows `first_row`, `first_row + 1`, ..."""
        for length in self._lengths:
            self._see(*rows.ngrams(length), first_row)

    def _see(self, grams: NDArray[np.uint64], text: NDArray[np.int64], first_row: int) -> None:
        if not len(self._grams) or not len(grams):
            return
        at = np.minimum(np.searchsorted(self._grams, grams), len(self._grams) - 1)
        new = (self._grams[at] == grams) & (self._row[at] < 0)
        self._row[at[new][::-1]] = first_row + text[new][::-1]  # of several the first stays

    def result(self) -> dict[str, dict[str, Any]]:
        """By task: items, how many are too short to tell and how many are contaminated, and the worst of them."""
        count = sum(map(len, self.items.values()))
        found = self._row[self._place]
        total = np.bincount(self._owner, minlength=count)
        share = np.bincount(self._owner, weights=found >= 0, minlength=count) / np.maximum(total, 1)
        results = {}
        start = 0
        for task, texts in self.items.items():
            mine = share[start : start + len(texts)]
            bad = np.flatnonzero(mine >= self.overlap)
            worst = bad[np.argsort(-mine[bad], kind="stable")][:EXAMPLES]
            results[task] = {
                "items": len(texts),
                "too_short": int((total[start : start + len(texts)] == 0).sum()),
                "contaminated": len(bad),
                "share": len(bad) / max(len(texts), 1),
                "worst": [
                    {
                        "item": int(i),
                        "overlap": round(float(mine[i]), 4),
                        "train_row": _mode(found[(self._owner == start + i) & (found >= 0)]),
                        "text": texts[i][:200],
                    }
                    for i in worst
                ],
            }
            start += len(texts)
        return results


def check_split(
    file: Path, kind: str, check: DataCheck, name: str, workspace: Path, contamination: Contamination | None = None
) -> dict[str, Any]:
    """What one split's rows are like; `contamination` is shown all of them.

    Args:
        file: the split's Parquet file.
        kind: one of TEXTS.
        name: the split's name, for messages.
        workspace: a folder for 32 bytes a row while this runs.

    Raises DataError for a file that cannot be read.
    """
    source = open_table(file)
    rows = source.metadata.num_rows
    lengths, similar = LengthHistogram(), NearDuplicates(check.near_duplicate)
    languages: Counter[str] = Counter()
    empty = first = 0
    columns = [c for c in ("text", "prompt", "completion", "messages", "tools") if c in source.schema_arrow.names]
    together = batch_rows(table_bytes(source), rows, BATCH_BYTES, BATCH_ROWS)

    def batches() -> Iterator[pa.RecordBatch]:
        return source.iter_batches(together, columns=columns, use_threads=False)

    with (
        Spill(workspace / "contents", 1) as contents,
        Spill(workspace / "groups", 3) as groups,
        ProgressBar(f"check {name}", rows) as bar,
    ):
        for batch in batches():
            texts = row_texts(batch, kind)
            strings = texts.to_pylist()
            hashes = np.fromiter(map(_content_hash, strings), np.uint64, len(strings))
            lengths.add(pc.utf8_length(texts).to_numpy(zero_copy_only=False))
            empty += empty_answers(batch, kind)
            contents.add_all(hashes[:, None])
            for i in _sampled(hashes, LANGUAGE_ROWS, rows):
                languages[language(strings[i])] += 1
            found = words(texts)
            groups.add_all(near_duplicates.records(found, hashes, first))
            if contamination is not None:
                contamination.see(found, first)
            first += len(strings)
            bar.advance(len(strings))
        copies = sum(int((~first_of_groups(part, 1)).sum()) for part in contents.buckets())
        chosen = near_duplicates.chosen_rows(groups, check.sample_rows, max(rows, 1))
    with ProgressBar(f"near-duplicates in {name}", len(chosen)) as bar:
        first = 0
        for batch in batches():
            start, end = np.searchsorted(chosen, [first, first + len(batch)])
            if start < end:
                similar.see(row_texts(batch.take(pa.array(chosen[start:end] - first)), kind))
                bar.advance(int(end - start))
            first += len(batch)
    return {
        "rows": rows,
        "empty_answers": empty,
        "characters": lengths.result(),
        "exact_duplicates": _share(copies, rows),
        "near_duplicates": {**_share(similar.found, similar.rows), "similarity": check.near_duplicate},
        "languages": dict(languages.most_common()),
    }


def name_rows(found: Mapping[str, dict[str, Any]], file: Path) -> None:
    """Give each of the worst items the `origin`, file and line, of the row of `file` that it stands in.

    Raises DataError for a file that cannot be read.
    """
    worst = [item for entry in found.values() for item in entry["worst"]]
    origins = row_origins(file, (item["train_row"] for item in worst))
    for item in worst:
        item["origin"] = origins[item["train_row"]]


def refuse_contamination(found: Mapping[str, dict[str, Any]], check: DataCheck) -> None:
    """Log what was found; raise DataError where more than `max_contamination` of a task's items is contaminated."""
    for task, entry in found.items():
        log.info("%s: %d of %d items stand in training rows", task, entry["contaminated"], entry["items"])
    if check.max_contamination is None:
        return
    for task, entry in found.items():
        if entry["share"] > check.max_contamination:
            for item in entry["worst"]:
                log.warning("item %d stands in %s: %s", item["item"], item["origin"], item["text"])
            rows = dict.fromkeys(item["origin"] for item in entry["worst"])
            raise DataError(
                f"{entry['contaminated']} of {entry['items']} items of {task} ({100 * entry['share']:.1f} %) stand in "
                f"training rows ({', '.join(rows)}{', ...' * (entry['contaminated'] > len(entry['worst']))}), "
                f"data_check.max_contamination {check.max_contamination} allows fewer: take those rows out of the "
                "data, or allow it with data_check.max_contamination: null, which has the report name the worst items"
            )


def held_out(file: Path, kind: str) -> list[str]:
    """The questions of a split's rows."""
    source = open_table(file)
    return [text for batch in source.iter_batches(BATCH_ROWS) for text in questions(batch, kind)]


def language(text: str) -> str:
    """ISO 639-1 code of the language a text is most likely in; `none` without a letter."""
    part = text[:LANGUAGE_CHARS]
    return py3langid.classify(part)[0] if any(map(str.isalpha, part)) else "none"


def _sampled(hashes: NDArray[np.uint64], wanted: int, total: int) -> NDArray[np.intp]:
    """Indices of the rows that are chosen by hashes of their contents, about `wanted` of all `total`."""
    if total <= wanted:
        return np.arange(len(hashes))
    return np.flatnonzero(hashes < np.uint64(2**64 * wanted // total))


def _mode(values: NDArray[np.int64]) -> int:
    return Counter(values.tolist()).most_common(1)[0][0]


def _content_hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def _share(found: int, looked_at: int) -> dict[str, Any]:
    return {"found": found, "looked_at": looked_at, "share": found / max(looked_at, 1)}
