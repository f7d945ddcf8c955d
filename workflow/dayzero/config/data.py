"""`data`, `data_check`, `tokenize`: which rows, from where, and how they become tokens."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from dayzero.config.section import Section


class Data(Section):
    """Which rows, from where, and how they are split."""

    source: str | list[str] | None = None
    """`hf:org/name@revision`, local files, or `package:NAME==VERSION/path/inside`; several are concatenated."""
    validation_source: str | list[str] | None = None
    """Rows for the validation loss (of an `hf:` data set its split `validation`). null: cut, see `validation_size`."""
    test_source: str | list[str] | None = None
    """Held-out rows for evaluation (of an `hf:` data set its split `test`). null: cut, see `test_size`."""
    answers: str | list[str] | None = None
    """Only for format function_calling: the files with the accepted answers, joined on `id`."""
    sha256: str | dict[str, str] | None = None
    """Expected SHA-256 of the source file, or of each source by its text. null: recorded, not checked."""
    weights: list[PositiveFloat] | None = None
    """Share of the training samples that comes from each `source`, in its order. null: rows are just joined."""
    format: Literal[
        "auto",
        "text",
        "prompt_completion",
        "messages",
        "sharegpt",
        "alpaca",
        "squad",
        "multiple_choice",
        "template",
        "pretokenized",
        "function_calling",
    ] = "auto"
    """How a row is read (docs/data.md). auto: from the column names of each source, with the verdict printed."""
    template: dict[str, str] | None = None
    """Texts with `{column}` in them, as `text`, `prompt` + `completion`, or `user` + `assistant` (+ `system`)."""
    columns: dict[str, str] = {}
    """Other names for the format's columns, e.g. `{prompt: question, completion: answer}`."""
    subset: str | None = None
    """For `hf:` sources: the dataset's configuration name. null: its default."""
    split: str = "train"
    """For `hf:` sources: the split to read as `source`."""
    validation_size: NonNegativeInt | float = 0.05
    """Rows (an integer) or share (below 1) cut for validation where the data has none. 0: no validation."""
    test_size: NonNegativeInt | float = 0
    """Rows or share held out for evaluation where the data has none. 0: no test split."""
    split_seed: NonNegativeInt = 0
    """Seed of the split, apart from the run's seed so that all seeds of a sweep share one split."""
    max_rows: PositiveInt | None = None
    """Read at most this many rows of `source`, of several sources evenly. null: all."""
    max_chars: PositiveInt | None = None
    """Leave out rows with more characters than this, and count them. null: no limit."""
    on_bad_row: Literal["fail", "reject"] = "fail"
    """A row that breaks its format or that the chat template refuses (named by file and line): fail the stage, or set
    it aside in rejected.jsonl."""
    streaming: bool = False
    """Read `hf:` sources over the network without a copy on this disk. On by itself where `max_rows` is set."""


class DataCheck(Section):
    """What the data report looks at, and what it does not let pass (docs/data.md)."""

    max_contamination: float | None = Field(default=0.05, ge=0, le=1)
    """Largest share of a task's items that may stand in the training rows; more fails the stage. null: any share."""
    ngram: PositiveInt = 8
    """Words in a row by which an item is found in a training row; shorter items of 5 words or more are found whole."""
    overlap: float = Field(default=0.7, gt=0, le=1)
    """An item counts as contaminated when this share of its word runs stands in training rows."""
    near_duplicate: float = Field(default=0.8, gt=0, lt=1)
    """Rows are near-duplicates when they share this much of their runs of 5 words (Jaccard similarity)."""
    sample_rows: PositiveInt = 20_000
    """Rows of a split that near-duplicates are looked for among; of more rows a share, the same every time."""


class Tokenize(Section):
    """From rows to token rows of at most `seq_len`."""

    seq_len: PositiveInt = 1024
    """Tokens in a row; at most the model's context length."""
    packing: bool = True
    """Several documents in a row, none attending to another. Off: one document in a row."""
    long_documents: Literal["truncate", "split", "drop"] = "truncate"
    """What happens to documents longer than `seq_len`; each case is counted in the manifest."""
    min_label_tokens: PositiveInt = 1
    """Drop (and count) documents with fewer supervised tokens than this (below `seq_len`), e.g. after truncation."""
    loss_turns: Literal["all", "last"] = "all"
    """Conversations: which turns of `loss_roles` are supervised."""
    loss_roles: list[Literal["assistant", "user", "system", "tool"]] = ["assistant"]
    """Conversations: whose turns are supervised, with the token that ends each."""
    loss_parts: Literal["all", "tool_arguments"] = "all"
    """Conversations: all of a turn, or only the arguments of its tool calls, empty ones too."""
    loss_reasoning: bool = True
    """Conversations: supervise reasoning too: `reasoning_content`, and `<think>` blocks, empty ones as well."""
    special_text: Literal["auto", "plain", "special"] = "auto"
    """What a control token's text (`<|im_end|>`) in a row becomes. auto: text in conversations, else the token."""
