"""`python -m bench.written`: the tables of README and docs that come from bench/results, written where their marks stand.

    <!-- figures: anyscale-ratios -->
    … the table …
    <!-- end of figures -->

What stands between the marks is made from the committed JSON alone, so nobody copies a number by hand; `--check` says what
would change. Reads and writes Markdown files; measures nothing.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from bench import anyscale_report, tables
from bench.anyscale_summary import Summary, summary

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
        if found[2] not in _TABLES:
            raise WrittenError(f"there are no figures {found[2]!r}; there are {', '.join(_TABLES)}")
        return f"{found[1]}{_TABLES[found[2]](results)}{found[4]}"

    if text.count("<!-- figures:") != len(_MARKED.findall(text)):
        raise WrittenError("a `<!-- figures: … -->` has no `<!-- end of figures -->`")
    return _MARKED.sub(table, text)


def _anyscale(rows: Callable[[Summary], anyscale_report.Rows]) -> Callable[[Path], str]:
    def table(results: Path) -> str:
        try:
            line, _ = anyscale_report.newest(anyscale_report.read(results / "anyscale.jsonl"))
        except anyscale_report.ReportError as error:
            raise WrittenError(str(error)) from None
        return anyscale_report.markdown(rows(summary(line)))

    return table


def _lines(path: Path) -> list[dict[str, Any]]:
    """Raises WrittenError."""
    try:
        return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    except OSError as error:
        raise WrittenError(f"{path}: {error.strerror}") from None


def _simulated(results: Path) -> str:
    """`make bench-scheduler`: the newest line of each workload and policy, in the order in which they first came."""
    newest: dict[tuple[str, str], dict[str, Any]] = {}
    for line in _lines(results / "simulate.jsonl"):
        if line["what"] == "simulate":
            newest[line["workload"]["name"], line["policy"]] = line["figures"]
    heads = ("workload", "policy", "output tokens/s", "TTFT p50", "ITL p99", "E2E p99", "KV waste")
    rows = [
        (
            workload,
            policy,
            f"{found['output_tokens_per_s']:,.0f}",
            tables.seconds(found["ttft"]["p50"]),
            tables.seconds(found["itl"]["p99"]),
            tables.seconds(found["e2e"]["p99"]),
            tables.share(found["kv_waste"]),
        )
        for (workload, policy), found in newest.items()
    ]
    return anyscale_report.markdown([heads, *rows], words=2)


_TABLES: dict[str, Callable[[Path], str]] = {
    "anyscale-throughput": _anyscale(anyscale_report.throughput_rows),
    "anyscale-ratios": _anyscale(anyscale_report.ratio_rows),
    "anyscale-latency": _anyscale(anyscale_report.latency_rows),
    "anyscale-kv-waste": _anyscale(anyscale_report.waste_rows),
    "simulate": _simulated,
}


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
