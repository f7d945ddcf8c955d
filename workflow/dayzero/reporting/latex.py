"""The score table for a paper: LaTeX with booktabs."""

from __future__ import annotations

from dayzero.reporting.scores import DASH, Cell, ScoreTable

SPECIAL = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    "\N{EN DASH}": "--",
    "·": r"$\cdot$",
    "±": r"$\pm$",
    "↑": r"$\uparrow$",
    "↓": r"$\downarrow$",
}


def escape(text: str) -> str:
    """`text` as LaTeX shows it, whatever it holds; characters LaTeX's default fonts lack become question marks."""
    return "".join(SPECIAL.get(c, c if " " <= c <= "~" else "?") for c in text)


def latex_table(experiment: str, table: ScoreTable) -> str:
    r"""A `table` environment; needs \usepackage{booktabs}, and T1 fonts for a quotation mark in a name."""
    lines = [
        r"% \usepackage{booktabs}",
        r"\begin{table}",
        r"  \centering",
        rf"  \caption{{Scores of {escape(experiment)}: value $\pm$ standard error, best in bold.{_notes(table)}}}",
        rf"  \label{{tab:{''.join(c for c in experiment if c.isalnum() or c == '-')}}}",
        rf"  \begin{{tabular}}{{l{'r' * len(table.columns)}}}",
        r"    \toprule",
    ]
    if table.columns:
        groups, rules, start = [], [], 2
        for task, span in table.task_spans():
            label = " ".join(filter(None, [task, f"({table.tasks[task]})" if table.tasks[task] else ""]))
            groups.append(rf"\multicolumn{{{span}}}{{c}}{{{escape(label)}}}")
            rules.append(rf"\cmidrule(lr){{{start}-{start + span - 1}}}")
            start += span
        lines += [f"    & {' & '.join(groups)} \\\\", f"    {' '.join(rules)}"]
    header = ["Run", *(f"{column.metric} {column.arrow}".strip() for column in table.columns)]
    lines += [f"    {' & '.join(map(escape, header))} \\\\", r"    \midrule"]
    for row, run in enumerate(table.runs):
        cells = [escape(run), *(_cell(column.cells[row]) for column in table.columns)]
        lines.append(f"    {' & '.join(cells)} \\\\")
    return "\n".join([*lines, r"    \bottomrule", r"  \end{tabular}", r"\end{table}", ""])


def _cell(cell: Cell) -> str:
    if cell.value == DASH:
        return "--"
    value = escape(cell.text) if cell.comparable else escape(cell.text) + r"$^\dagger$"
    return rf"\textbf{{{value}}}" if cell.best else value


def _notes(table: ScoreTable) -> str:
    return "".join(rf" $^\dagger${escape(note)}" for note in table.incomparable)
