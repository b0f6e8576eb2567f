"""`python -m bench.written`: the tables of README and docs that come from bench/results, written where their marks stand.

    <!-- figures: anyscale-ratios -->
    … the table …
    <!-- end of figures -->

What stands between the marks is made from the committed JSON alone, so nobody copies a number by hand; `--check` says what
would change. Reads and writes Markdown files; measures nothing.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import click

from bench import anyscale_report
from bench.result_tables import TABLES

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
_MARKED = re.compile(r"(<!-- figures: ([\w-]+) -->\n)(.*?)(<!-- end of figures -->)", re.DOTALL)


class WrittenError(Exception):
    """A mark that means nothing, or results that are missing; the text is one line."""


def files() -> list[Path]:
    """Those that may hold marks."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def filled(text: str, results: Path) -> str:
    """The text with what its marks ask for. Raises WrittenError."""

    def table(found: re.Match[str]) -> str:
        if found[2] not in TABLES:
            raise WrittenError(f"there are no figures {found[2]!r}; there are {', '.join(TABLES)}")
        try:
            return f"{found[1]}{TABLES[found[2]](results)}{found[4]}"
        except anyscale_report.ReportError as error:
            raise WrittenError(str(error)) from None
        except OSError as error:
            raise WrittenError(f"{error.filename}: {error.strerror}") from None

    if text.count("<!-- figures:") != len(_MARKED.findall(text)):
        raise WrittenError("a `<!-- figures: … -->` has no `<!-- end of figures -->`")
    return _MARKED.sub(table, text)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--check", is_flag=True, help="Change nothing; exit code 1 when something would change.")
def main(check: bool) -> None:
    """Write the tables of README and docs from bench/results."""
    changed = []
    for path in files():
        before = path.read_text()
        try:
            after = filled(before, RESULTS)
        except WrittenError as error:
            raise click.ClickException(f"{path.relative_to(ROOT)}: {error}") from None
        if after != before:
            changed.append(path)
            if not check:
                path.write_text(after)
    for path in changed:
        click.echo(f"{path.relative_to(ROOT)} {'would change' if check else 'written'}")
    sys.exit(1 if check and changed else 0)


if __name__ == "__main__":
    main()
