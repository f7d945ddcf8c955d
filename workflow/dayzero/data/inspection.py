"""Rows of a token store as people read them: which text is supervised, where documents begin, which tokens are control.

Texts are shown, never obeyed: characters that would move a terminal's cursor or turn the reading direction are written
as their code.
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from pathlib import Path

import jinja2
import numpy as np
from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from dayzero.data.stored_table import row_origins
from dayzero.data.tokenizer import special_tokens
from dayzero.data.tokens import IGNORE, TokenRows
from dayzero.errors import ConfigError

LONGEST_CHARACTER = 8
"""Tokens that one character may be spread over (a byte each, in sequences joined to one sign)."""
_TEMPLATE = Path(__file__).with_name("inspect.html")


@dataclass(frozen=True)
class Piece:
    """The text of one token, or of those that only together are a character."""

    text: str
    token_ids: list[int]
    supervised: bool
    special: bool


@dataclass(frozen=True)
class DocumentView:
    """One document of a row."""

    origin: str
    """Where the row came from, `file:line`."""
    pieces: list[Piece]
    num_tokens: int
    num_label_tokens: int


@dataclass(frozen=True)
class RowView:
    """One row of tokens."""

    index: int
    documents: list[DocumentView]


def view_rows(
    rows: TokenRows, indices: range, tokenizer: PreTrainedTokenizerBase, data_file: Path | None = None
) -> list[RowView]:
    """The rows of the given indices; `data_file`: the split's Parquet file, for where documents came from.

    Raises ConfigError for an index beyond the last row.
    """
    if indices.start < 0 or indices.stop > len(rows):
        raise ConfigError(f"row {indices.stop - 1} of {rows.path}: it has {len(rows)} rows, from 0 to {len(rows) - 1}")
    control = {tokenizer.get_added_vocab().get(t, -1) for t in special_tokens(tokenizer)}
    views = []
    for index in indices:
        row = rows.row(index)
        supervised = np.concatenate([[False], row.labels[:-1] != IGNORE])
        ids = row.document_ids.tolist()
        origins = row_origins(data_file, ids) if data_file else {i: f"row {i}" for i in ids}
        documents = []
        for number, source_row in enumerate(row.document_ids.tolist()):
            here = slice(int(row.cu_seqlens[number]), int(row.cu_seqlens[number + 1]))
            ids, mask = row.input_ids[here].tolist(), supervised[here].tolist()
            pieces = _pieces(ids, mask, tokenizer, control)
            documents.append(DocumentView(origins[source_row], pieces, len(ids), sum(mask)))
        views.append(RowView(index, documents))
    return views


def print_rows(views: list[RowView], console: Console) -> None:
    """Show rows in a terminal: supervised text green and underlined, control tokens magenta, the rest dim. Where there
    are no colours, as in a pipe or a file, supervised text stands between brackets."""
    plain = console.color_system is None or console.no_color
    for view in views:
        console.rule(f"[bold]row {view.index}[/] · {_count(len(view.documents), 'document')}", style="bold")
        for number, document in enumerate(view.documents, 1):
            console.print(Text(f"── {_heading(number, document)}", "bold"), soft_wrap=True)
            text = Text()
            for supervised, pieces in groupby(document.pieces, lambda piece: piece.supervised):
                style = "green underline" if supervised else "dim"
                text.append("⟦" if plain and supervised else "")
                for piece in pieces:
                    text.append(visible(piece.text), f"{style} magenta not dim" if piece.special else style)
                text.append("⟧" if plain and supervised else "")
            console.print(text, soft_wrap=True)
    if plain:
        console.print("⟦supervised⟧  not supervised  (there are no colours here)")
        return
    console.print(
        Text.assemble(
            ("supervised", "green underline"), "  ", ("control token", "magenta"), "  ", ("not supervised", "dim")
        )
    )


def html_page(views: list[RowView], title: str) -> str:
    """The same as one self-contained page; each token says its id under the pointer."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters["visible"] = visible
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    return template.render(title=title, rows=views, heading=_heading)


def visible(text: str) -> str:
    """The text with line ends marked and with codes in place of characters that act on their surroundings."""
    return "".join(map(_visible, text))


@cache
def _visible(character: str) -> str:
    if character == "\n":
        return "↵\n"
    if character in "\t\u200c\u200d" or unicodedata.category(character) not in ("Cc", "Cf", "Cn", "Co", "Zl", "Zp"):
        return character
    return f"\\u{ord(character):04x}"


def _pieces(ids: list[int], mask: list[bool], tokenizer: PreTrainedTokenizerBase, control: set[int]) -> list[Piece]:
    """Each token's own text, as it adds to the text before it; incomplete characters wait for their other tokens."""
    pieces: list[Piece] = []
    start = done = 0  # of the tokens before, those that decide how the next one reads, and those already shown
    for end in range(1, len(ids) + 1):
        text = _decode(tokenizer, ids[start:end])
        if text.endswith("\ufffd") and end - done < LONGEST_CHARACTER and end < len(ids) and ids[end] not in control:
            continue
        shown = _decode(tokenizer, ids[start:done])
        token_ids = ids[done:end]
        pieces.append(Piece(text[len(shown) :], token_ids, any(mask[done:end]), token_ids[-1] in control))
        start, done = done, end
    return pieces


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False)) if ids else ""


def _heading(number: int, document: DocumentView) -> str:
    tokens = f"{_count(document.num_tokens, 'token')}, {document.num_label_tokens} supervised"
    return f"document {number} · {visible(document.origin)} · {tokens}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")
