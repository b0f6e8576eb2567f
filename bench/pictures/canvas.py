"""A picture as a list of shapes, written as SVG (by hand) or PNG (by matplotlib). Knows colours, not what they stand for.

A shape names a role, never a colour; a theme says which colour that is. The colours of data are those of Okabe and Ito (2008),
which people with any kind of colour vision can tell apart, on a light and on a dark ground.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias
from xml.sax.saxutils import escape, quoteattr

Anchor: TypeAlias = Literal["start", "middle", "end"]

FONT_PX = {"title": 17, "panel": 14, "normal": 13, "small": 12, "tiny": 10}
_BOLD = ("title", "panel")
_DATA = {
    "prefill": "#E69F00",
    "decode": "#0072B2",
    "decode-next": "#56B4E9",
    "preempted": "#D55E00",
    "used": "#0072B2",
    "shared": "#CC79A7",
    "wasted": "#D55E00",
    "cached": "#009E73",
    "under-decode": "#0072B2",
    "under-decode-next": "#56B4E9",
    "on-decode": "#FFFFFF",
    "on-decode-next": "#10212E",
    "series-1": "#999999",
    "series-2": "#CC79A7",
    "series-3": "#D55E00",
    "series-4": "#009E73",
    "series-5": "#0072B2",
    "series-6": "#E69F00",
    "series-7": "#56B4E9",
}
LIGHT: Mapping[str, str] = _DATA | {
    "ground": "#FFFFFF",
    "idle": "#ECEFF2",
    "padding": "#A9B1BA",
    "retiring": "#A9B1BA",
    "free": "#ECEFF2",
    "ink": "#1F2328",
    "muted": "#57606A",
    "waiting": "#8C959F",
    "grid": "#D0D7DE",
    "gap": "#FFFFFF",
}
DARK: Mapping[str, str] = _DATA | {
    "ground": "#0D1117",
    "idle": "#1C222B",
    "padding": "#5B6570",
    "retiring": "#5B6570",
    "free": "#1C222B",
    "ink": "#E6EDF3",
    "muted": "#9DA7B3",
    "waiting": "#768390",
    "grid": "#30363D",
    "gap": "#0D1117",
}
THEMES: Mapping[str, Mapping[str, str]] = {"light": LIGHT, "dark": DARK}


class NoMatplotlibError(Exception):
    """PNG was asked for where matplotlib, of the extra `bench`, is not installed."""


@dataclass(frozen=True, slots=True)
class Rect:
    x: float
    y: float
    width: float
    height: float
    role: str


@dataclass(frozen=True, slots=True)
class Area:
    """A filled polygon."""

    points: tuple[tuple[float, float], ...]
    role: str


@dataclass(frozen=True, slots=True)
class Line:
    x1: float
    y1: float
    x2: float
    y2: float
    role: str
    dashed: bool = False
    width: float = 1.0


@dataclass(frozen=True, slots=True)
class Text:
    x: float
    y: float  # of the baseline
    text: str
    role: str = "ink"
    size: str = "normal"
    anchor: Anchor = "start"


Shape: TypeAlias = Rect | Area | Line | Text


@dataclass
class Picture:
    """Pixels, from the upper left. about: what it shows, for those who can't see it."""

    width: int
    height: int
    about: str
    shapes: list[Shape] = field(default_factory=list)

    def add(self, shapes: Iterable[Shape]) -> None:
        self.shapes += shapes


def text_width(text: str, size: str = "normal") -> float:
    """Pixels, about: no font is at hand."""
    return 0.55 * FONT_PX[size] * len(text)


# ------------------------------------------------------------------------------------------------------------------- SVG


def svg(picture: Picture, theme: str = "auto") -> str:
    """theme: light, dark, or auto, which is light and turns dark where the reader has asked for that."""
    width, height = picture.width, picture.height
    roles = sorted({shape.role for shape in picture.shapes} | {"ground"})
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img"'
        f" aria-label={quoteattr(picture.about)}>",
        f"<title>{escape(picture.about)}</title>",
        f"<style>{_style(roles, theme)}</style>",
        f'<rect class="ground" width="{width}" height="{height}" rx="6"/>',
        *map(_element, picture.shapes),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _style(roles: Sequence[str], theme: str) -> str:
    fonts = "text{font-family:system-ui,-apple-system,'Segoe UI',Roboto,'DejaVu Sans',sans-serif;stroke:none}"
    sizes = "".join(
        f".{name}{{font-size:{pixels}px{';font-weight:600' if name in _BOLD else ''}}}" for name, pixels in FONT_PX.items()
    )
    lines = "line{fill:none}"
    colours = _colours(roles, THEMES["light" if theme == "auto" else theme])
    dark = f"@media (prefers-color-scheme:dark){{{_colours(roles, DARK)}}}" if theme == "auto" else ""
    return fonts + sizes + lines + colours + dark


def _colours(roles: Sequence[str], colours: Mapping[str, str]) -> str:
    return "".join(f".{role}{{fill:{colours[role]}}}line.{role}{{stroke:{colours[role]}}}" for role in roles)


def _element(shape: Shape) -> str:
    match shape:
        case Rect(x, y, width, height, role):
            return f'<rect class="{role}" x="{_n(x)}" y="{_n(y)}" width="{_n(width)}" height="{_n(height)}"/>'
        case Area(points, role):
            return f'<polygon class="{role}" points="{" ".join(f"{_n(x)},{_n(y)}" for x, y in points)}"/>'
        case Line(x1, y1, x2, y2, role, dashed, width):
            more = ' stroke-dasharray="5 4"' if dashed else ""
            more += f' stroke-width="{_n(width)}"' if width != 1 else ""
            return f'<line class="{role}" x1="{_n(x1)}" y1="{_n(y1)}" x2="{_n(x2)}" y2="{_n(y2)}"{more}/>'
        case Text(x, y, text, role, size, anchor):
            more = f' text-anchor="{anchor}"' if anchor != "start" else ""
            return f'<text class="{role} {size}" x="{_n(x)}" y="{_n(y)}"{more}>{escape(text)}</text>'


def _n(value: float) -> str:
    """Hundredths of a pixel, no trailing zeros."""
    return f"{value:.2f}".rstrip("0").rstrip(".")


# ------------------------------------------------------------------------------------------------------------------- PNG


def png(picture: Picture, theme: str = "light", scale: float = 2.0) -> bytes:
    """scale: pixels of the image for one of the picture. Raises NoMatplotlibError."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise NoMatplotlibError("PNG needs matplotlib: pip install 'carousel-serve[bench]', or take --format svg") from None
    colours = THEMES[theme]
    figure = Figure(figsize=(picture.width / 100, picture.height / 100), dpi=100 * scale, facecolor=colours["ground"])
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.set_axis_off()
    axes.set_xlim(0, picture.width)
    axes.set_ylim(picture.height, 0)
    for order, shape in enumerate(picture.shapes):
        _plot(axes, shape, colours[shape.role], order)
    file = io.BytesIO()
    FigureCanvasAgg(figure).print_png(file)
    return file.getvalue()


def _plot(axes: object, shape: Shape, colour: str, order: int) -> None:
    """axes: matplotlib's; later shapes lie above earlier ones."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Polygon, Rectangle

    points = 72 / 100  # of a pixel
    match shape:
        case Rect(x, y, width, height):
            axes.add_patch(Rectangle((x, y), width, height, facecolor=colour, edgecolor="none", zorder=order))  # type: ignore[attr-defined]
        case Area(corners):
            axes.add_patch(Polygon(corners, closed=True, facecolor=colour, edgecolor="none", zorder=order))  # type: ignore[attr-defined]
        case Line(x1, y1, x2, y2, _, dashed, width):
            dashes = (0, (5, 4)) if dashed else "-"
            line = Line2D((x1, x2), (y1, y2), color=colour, linewidth=width * points, linestyle=dashes, zorder=order)
            axes.add_line(line)  # type: ignore[attr-defined]
        case Text(x, y, text, _, size, anchor):
            align = {"start": "left", "middle": "center", "end": "right"}[anchor]
            weight = "bold" if size in _BOLD else "normal"
            axes.text(  # type: ignore[attr-defined]
                x,
                y,
                text,
                color=colour,
                fontsize=FONT_PX[size] * points * 0.95,
                ha=align,
                va="baseline",
                weight=weight,
                zorder=order,
                parse_math=False,
            )
