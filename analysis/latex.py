"""A table as LaTeX: booktabs rules, whatever a record says stays text."""

from __future__ import annotations

from collections.abc import Sequence

SPECIAL = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", '"': "{''}", "Δ": r"$\Delta$", "±": r"$\pm$", "−": "$-$", "–": "--",
    "×": r"$\times$", "≤": r"$\leq$", "≥": r"$\geq$", "ρ": r"$\rho$", "τ": r"$\tau$", "·": r"$\cdot$",
    "\N{NO-BREAK SPACE}": "~", "“": "``", "”": "''",
}  # fmt: skip


def escape(text: str) -> str:
    """Text on one line in which no character is a command; control characters are left out."""
    return "".join(SPECIAL.get(sign, sign) for sign in text.replace("\n", " ") if sign in SPECIAL or sign.isprintable())


def cell(text: str, bold: bool = False, underlined: bool = False) -> str:
    """A cell's text, `\\textbf` and `\\underline` around it where it is marked."""
    inside = escape(text)
    inside = rf"\underline{{{inside}}}" if underlined else inside
    return rf"\textbf{{{inside}}}" if bold else inside


def table(
    label: str, caption: str, headings: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[bool]
) -> str:
    """A whole `table` environment; needs `\\usepackage{booktabs}`. rows: cells made by `cell`; right: align right."""
    lines = [" & ".join(cells) + r" \\" for cells in rows]
    return "\n".join(
        [
            r"% needs \usepackage{booktabs}",
            r"\begin{table}[t]",
            r"\centering",
            rf"\caption{{{escape(caption)}}}",
            rf"\label{{tab:{label}}}",
            rf"\begin{{tabular}}{{{''.join('r' if is_right else 'l' for is_right in right)}}}",
            r"\toprule",
            " & ".join(escape(heading) for heading in headings) + r" \\",
            r"\midrule",
            *lines,
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
            "",
        ]
    )
