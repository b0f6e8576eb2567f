"""`python -m bench.anyscale_report`: the headline experiment's report from its JSON: a table, one HTML file, PNGs, Markdown.

The HTML needs no network: its pictures are inline SVG. Nothing is measured here, so the same file gives the same report.
"""

from __future__ import annotations

import html as escaping
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click
from rich import box
from rich.console import Console
from rich.table import Table

from bench import anyscale_plots
from bench.anyscale_summary import (
    CONTINUOUS,
    CONTINUOUS_ALL,
    PREFILL_FIRST,
    STATIC,
    SYSTEMS,
    Cap,
    Ratio,
    Summary,
    summary,
)
from bench.cpu_workload import Noise
from bench.pictures.canvas import NoMatplotlibError, Picture, png, svg
from bench.tables import number, seconds, share

WHAT = "anyscale"  # of the lines that are meant
_PLOTS: dict[str, Callable[[Summary], Picture]] = {
    "throughput": anyscale_plots.throughput,
    "latency": anyscale_plots.latency,
    "kv_waste": anyscale_plots.kv_waste,
}
_MISSING = "–"
Rows = list[tuple[str, ...]]


class ReportError(Exception):
    """A file that holds no such results; the text is one line."""


def read(path: Path) -> list[dict[str, Any]]:
    """The experiment's lines, in order. Raises ReportError."""
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
        found = [line for line in lines if line.get("what") == WHAT and line["caps"]]
    except OSError as error:
        raise ReportError(f"{path}: {error.strerror}") from None
    except (ValueError, KeyError, AttributeError) as error:
        raise ReportError(f"{path} holds no results of bench.anyscale: {error!r}") from None
    if not found:
        raise ReportError(f"{path} holds no results of bench.anyscale")
    return found


def newest(lines: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The line to report: of those that finished the largest size, of these the least seed, of these the last one; and the
    newest of each other seed of that size and machine."""
    order = ("quick", "cpu", "full")
    best = max(enumerate(lines), key=lambda at: (at[1]["finished"], order.index(at[1]["size"]), -at[1]["seed"], at[0]))[1]
    others: dict[int, dict[str, Any]] = {}
    for line in lines:
        alike = all(line[name] == best[name] for name in ("size", "machine", "shape"))
        if alike and line["finished"] and line["seed"] != best["seed"]:
            others[line["seed"]] = line
    return best, [others[seed] for seed in sorted(others)]


# ------------------------------------------------------------------------------------------------------------------ tables


def _span(noise: Noise | None, write: Callable[[float], str] = number) -> str:
    """The median, and from the least to the most where there are several."""
    if noise is None:
        return _MISSING
    least, median, most = write(noise.least), write(noise.median), write(noise.most)
    return median if least == most else f"{median} ({least}–{most})"


def _times(value: float) -> str:
    return f"{value:.2f}" if value < 9.995 else f"{value:.1f}"


def _ratio(ratio: Ratio | None) -> str:
    return _MISSING if ratio is None else _span(ratio.value, _times)


def _of_bound(ratio: Ratio | None) -> str:
    if ratio is None or ratio.bound is None or ratio.share is None:
        return _MISSING
    return f"{_times(ratio.bound)}; {ratio.share:.0%}"


def _tokens(value: float) -> str:
    return f"{value:,.0f}"


def _waste(cap: Cap, name: str) -> str:
    return _span(cap.kv_waste.get(name), share)


def throughput_rows(found: Summary) -> Rows:
    """Heads first."""
    heads = ("system, tokens/s", *(f"cap {cap.cap}" for cap in found.caps))
    rows = [
        (label, *(_span(cap.tokens_per_s.get(name), _tokens) for cap in found.caps))
        for name, label in SYSTEMS.items()
        if any(name in cap.tokens_per_s for cap in found.caps)
    ]
    limits = [cap.limit_tokens_per_s for cap in found.caps]
    if any(limits):
        rows.append(("the machine's limit", *(_tokens(limit) if limit else _MISSING for limit in limits)))
    return [heads, *rows]


def ratio_rows(found: Summary) -> Rows:
    heads = ("continuous ÷", *(f"cap {cap.cap}" for cap in found.caps))
    wanted: tuple[tuple[str, Callable[[Cap], str]], ...] = (
        ("(a) static, equal kernels and memory", lambda cap: _ratio(cap.ratio_a)),
        ("… its bound; share reached", lambda cap: _of_bound(cap.ratio_a)),
        ("(a) static, both with all memory", lambda cap: _ratio(cap.ratio_a_all)),
        ("… its bound; share reached", lambda cap: _of_bound(cap.ratio_a_all)),
        ("(b) transformers, padded batches", lambda cap: _ratio(cap.ratio_b)),
        ("(b), Carousel with all memory", lambda cap: _ratio(cap.ratio_b_all)),
        ("… its bound (machine's limit); share reached", lambda cap: _of_bound(cap.ratio_b_all)),
    )
    return [heads, *((label, *(cell(cap) for cap in found.caps)) for label, cell in wanted)]


def waste_rows(found: Summary) -> Rows:
    heads = ("KV waste", *(f"cap {cap.cap}" for cap in found.caps))
    names = (STATIC, PREFILL_FIRST, CONTINUOUS, CONTINUOUS_ALL)
    return [
        heads,
        ("reserve the model's length (computed)", *(share(cap.reserve_max_waste) for cap in found.caps)),
        *((SYSTEMS[name], *(_waste(cap, name) for cap in found.caps)) for name in names),
        ("perfect", *("0.0%" for _ in found.caps)),
    ]


def latency_rows(found: Summary) -> Rows:
    heads = ("E2E latency", *(f"{load.load:g} × static, {what}" for load in found.loads for what in ("p50", "p99")))
    rows = []
    for name, label in SYSTEMS.items():
        if any(name in load.p50 for load in found.loads):
            cells = [_span(spread.get(name), seconds) for load in found.loads for spread in (load.p50, load.p99)]
            rows.append((label, *cells))
    return [heads, *rows]


def seed_rows(found: Summary, others: Sequence[Summary]) -> Rows:
    """The same conclusions from other draws."""
    everyone = [found, *others]
    heads = ("conclusion", *(f"seed {one.line['seed']}" for one in everyone))
    ratios = [
        (
            f"continuous ÷ static, cap {cap.cap}",
            *(_ratio(one.caps[at].ratio_a) if at < len(one.caps) else _MISSING for one in everyone),
        )
        for at, cap in enumerate(found.caps)
    ]
    return [heads, *ratios, *((what, *(_holds(one.holds[what]) for one in everyone)) for what in found.holds)]


def _holds(value: bool | None) -> str:
    return {True: "holds", False: "does not hold", None: "not measured"}[value]


def notes(found: Summary) -> list[str]:
    """What a reader must know."""
    line = found.line
    told = [line["scaling"]]
    if found.is_busy:
        told.append(f"The machine was busy: a load average of {line['load before']:.1f} before the first run. Measure again.")
    if not line["finished"]:
        told.append("Not finished: some runs are missing.")
    told += [
        f"{SYSTEMS.get(system, system)} failed: {why.splitlines()[-1] if why else ''}" for system, why in line["failed"].items()
    ]
    told.append(
        "Tokens a second count prompts and outputs over wall time: "
        + ("one round." if found.rounds == 1 else f"medians of {found.rounds} rounds (least–most), in turns.")
    )
    counts = {run["requests"] for cap in line["caps"] for runs in cap["runs"].values() for run in runs if "requests" in run}
    if counts and min(counts) < line["requests"]:
        told.append(
            f"transformers was given the first {min(counts)} to {max(counts)} of {line['requests']} requests; what padded"
            " batches need for all follows from their pace, and a row's tokens count as soon as they are made."
        )
    errors = [ratio.fit_error for cap in found.caps for ratio in (cap.ratio_a, cap.ratio_a_all) if ratio and ratio.fit_error]
    if errors:
        told.append(
            "The bound of (a) comes from step costs fitted to these very runs (a step's median error is"
            f" at most {max(errors):.0%}): the static policy simulated with them ÷ the least any schedule needs."
        )
    busiest = max((cap.generator_cpu_share for cap in found.caps), default=0.0)
    told.append(f"The load generator took {busiest:.1%} of a core at most.")
    return told


def show(found: Summary, console: Console) -> None:
    """As tables on a terminal."""
    for note in notes(found):
        console.print(note, soft_wrap=True)
    for rows in (throughput_rows(found), ratio_rows(found), waste_rows(found), latency_rows(found)):
        if len(rows) > 1 and len(rows[0]) > 1:
            console.print(_table(rows))
    for what, value in found.holds.items():
        console.print(f"{_holds(value)}: {what}")


def _table(rows: Rows) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(rows[0][0], no_wrap=True)
    for head in rows[0][1:]:
        table.add_column(head, justify="right", no_wrap=True)
    for row in rows[1:]:
        table.add_row(*row)
    return table


def markdown(rows: Rows, words: int = 1) -> str:
    """Numbers to the right of so many columns of words."""
    align = "|" + " --- |" * words + " ---: |" * (len(rows[0]) - words)
    head, *body = ("| " + " | ".join(row) + " |" for row in rows)
    return "\n".join([head, align, *body]) + "\n"


# -------------------------------------------------------------------------------------------------------------------- HTML

_STYLE = """
:root{color-scheme:light dark;--ink:#1f2328;--muted:#57606a;--ground:#fff;--line:#d0d7de;--soft:#f6f8fa}
@media (prefers-color-scheme:dark){:root{--ink:#e6edf3;--muted:#9da7b3;--ground:#0d1117;--line:#30363d;--soft:#161b22}}
body{margin:0;background:var(--ground);color:var(--ink);font:15px/1.5 system-ui,-apple-system,'Segoe UI',Roboto,sans-serif}
main{max-width:980px;margin:0 auto;padding:32px 20px 64px}
h1{font-size:28px;line-height:1.2;margin:0 0 8px}h2{font-size:20px;margin:40px 0 8px}
p,li{max-width:80ch}.muted{color:var(--muted)}.lead{font-size:18px}
.scroll{overflow-x:auto;margin:12px 0}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;min-width:60%}
th,td{padding:6px 10px;font-size:14px;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap}
th:first-child,td:first-child{text-align:left;padding-left:0}thead th{color:var(--muted);font-weight:600}
.scroll svg{display:block;max-width:100%;height:auto;border:1px solid var(--line);border-radius:6px}
.verdicts{list-style:none;padding:0}
.verdicts li::before{content:attr(data-mark);display:inline-block;width:8.5em;font-weight:600}
.busy{border-left:4px solid #d55e00;background:var(--soft);padding:8px 12px}
""".strip()


def html(lines: Sequence[dict[str, Any]]) -> str:
    """One page that needs nothing else."""
    best, others = newest(lines)
    found = summary(best)
    body = "\n".join(_body(found, [summary(other) for other in others]))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        "<title>Carousel: continuous batching, measured</title>"
        f"<style>{_STYLE}</style></head>\n<body><main>\n{body}\n</main></body></html>\n"
    )


def _body(found: Summary, others: Sequence[Summary]) -> Iterator[str]:
    line = found.line
    yield "<h1>Continuous batching, measured</h1>"
    machine = line["machine"]
    yield _paragraph(
        f"{machine['cpu']}, {machine['cores']} cores · {line['date']} · commit {line['commit']} · seed {line['seed']}", "muted"
    )
    yield _paragraph(_headline(found), "lead")
    first, *rest = notes(found)
    if found.is_busy:
        yield _paragraph(rest.pop(0), "busy")
    yield _paragraph(first)
    yield "<ul class='verdicts'>"
    for what, value in found.holds.items():
        yield f"<li data-mark='{_holds(value)}'>{escaping.escape(what)}</li>"
    yield "</ul>"
    yield "<h2>Throughput</h2>"
    yield _picture(found, "throughput")
    yield _html_table(throughput_rows(found))
    yield _html_table(ratio_rows(found))
    if found.loads:
        yield "<h2>Latency</h2>"
        yield _picture(found, "latency")
        yield _html_table(latency_rows(found))
    yield "<h2>KV memory</h2>"
    yield _picture(found, "kv_waste")
    yield _html_table(waste_rows(found))
    yield "<h2>Another seed</h2>"
    yield _html_table(seed_rows(found, others))
    if not others:
        yield _paragraph("Only one seed so far: make bench-anyscale ARGS='--seed 1' adds another.", "muted")
    yield "<h2>How it was measured</h2><ul>"
    yield from (f"<li>{escaping.escape(note)}</li>" for note in rest)
    versions = ", ".join(f"{name} {number_of}" for name, number_of in line["versions"].items() if number_of)
    yield f"<li>{escaping.escape(versions)}</li></ul>"


def _headline(found: Summary) -> str:
    cap = found.caps[-1]
    parts = []
    if cap.ratio_a is not None:
        parts.append(f"{_times(cap.ratio_a.value.median)} times static batching on equal kernels and memory")
    ratio_b = cap.ratio_b_all or cap.ratio_b
    if ratio_b is not None:
        parts.append(f"{_times(ratio_b.value.median)} times transformers' padded batches")
    return f"At the largest cap, {cap.cap} tokens: {' and '.join(parts)}." if parts else "Too little was measured to compare."


def _paragraph(text: str, kind: str = "") -> str:
    return f"<p{f' class={chr(34)}{kind}{chr(34)}' if kind else ''}>{escaping.escape(text)}</p>"


def _picture(found: Summary, name: str) -> str:
    return f'<div class="scroll">{svg(_PLOTS[name](found))}</div>'


def _html_table(rows: Rows) -> str:
    head = "".join(f"<th>{escaping.escape(cell)}</th>" for cell in rows[0])
    body = "".join("<tr>" + "".join(f"<td>{escaping.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows[1:])
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


# ----------------------------------------------------------------------------------------------------------------- command


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--json", "json_file", type=click.Path(path_type=Path), required=True, metavar="FILE", help="What was measured.")
@click.option("--html", "html_file", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE", help="Write the report.")
@click.option(
    "--images", type=click.Path(path_type=Path, file_okay=False), metavar="DIR", help="Write anyscale_*.png and .svg there."
)
def main(json_file: Path, html_file: Path | None, images: Path | None) -> None:
    """Make the report, the pictures, or with neither a table on the terminal."""
    try:
        lines = read(json_file)
        found = summary(newest(lines)[0])
        if html_file is not None:
            html_file.parent.mkdir(parents=True, exist_ok=True)
            html_file.write_text(html(lines))
        if images is not None:
            images.mkdir(parents=True, exist_ok=True)
            for name, picture in pictures(found).items():
                (images / f"anyscale_{name}.svg").write_text(svg(picture))
                (images / f"anyscale_{name}.png").write_bytes(png(picture))
        if html_file is None and images is None:
            show(found, Console(highlight=False))
    except (ReportError, NoMatplotlibError) as error:
        raise click.ClickException(str(error)) from None
    except OSError as error:
        raise click.ClickException(f"{error.filename}: {error.strerror}") from None
    sys.exit(0)


def pictures(found: Summary) -> dict[str, Picture]:
    return {name: make(found) for name, make in _PLOTS.items() if name != "latency" or found.loads}


if __name__ == "__main__":
    main()
