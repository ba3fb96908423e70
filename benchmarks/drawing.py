"""Figures as SVG that reads on light and dark pages: a card, direct labels, and where and when below."""

import re
import textwrap
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .report import Row

INK, MUTED, FAINT, CARD = "#1f2328", "#59636e", "#d1d9e0", "#fefefe"
# On a dark page. An SVG file sees the page's preference where it is shown as an image, too.
DARK = {INK: "#f0f6fc", MUTED: "#9198a1", FAINT: "#3d444d", CARD: "#161b22"}
FONTS = "system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif"
MARGIN = 18
TIMES = "\N{MULTIPLICATION SIGN}"

# Of whom, and how. Okabe and Ito's colours, told apart by colour-blind readers, on white and on black.
PROVIDERS = {
    "eager": ("eager PyTorch", "#8c959f"),
    "compile": ("torch.compile", "#3b8fd0"),
    "liger kl": ("Liger, plain KL", "#009e73"),
    "trl": ("TRL, plain KL", "#cc79a7"),
    "eakd cpu": ("eakd_kernels", "#e0620d"),
    "eakd cuda": ("eakd, CUDA", "#e0620d"),
    "eakd triton": ("eakd, Triton", "#d39b00"),
}

STYLE = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "eakd_kernels",  # the same ids every time
    # Comes with matplotlib, so that the layout is the same everywhere. It is wide: what fits in it fits in FONTS.
    "font.family": "DejaVu Sans",
    "font.size": 10.5,
    "text.color": INK,
    "axes.edgecolor": FAINT,
    "axes.facecolor": "none",
    "axes.labelcolor": MUTED,
    "axes.labelsize": 9.5,
    "axes.titlecolor": INK,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.labelsize": 9.5,
    "ytick.labelsize": 9.5,
    "xtick.minor.visible": False,
    "ytick.minor.visible": False,
}


class Card:
    """A figure with a title above and a caption below. Places are in CSS pixels from the upper left corner."""

    def __init__(self, width: int, height: int, title: str, caption: str, letter: float = 6):
        """`letter`: pixels of one in the caption, as lines are broken."""
        lines = textwrap.wrap(caption, int(width / letter))
        self.width, self.height = width, height + 15 * len(lines) + MARGIN
        self.figure = Figure(figsize=(self.width / 96, self.height / 96), facecolor="none")
        self.text(MARGIN, 32, title, fontweight="bold", fontsize=12)
        for i, line in enumerate(lines):
            self.text(MARGIN, height + 15 * (i + 1), line, color=MUTED, fontsize=8.5)

    def text(self, x: float, y: float, text: str, **style) -> None:
        """`y` is that of the baseline."""
        self.figure.text(x / self.width, 1 - y / self.height, text, **style)

    def axes(self, left: float, top: float, width: float, height: float, **options) -> Axes:
        box = left / self.width, 1 - (top + height) / self.height, width / self.width, height / self.height
        return self.figure.add_axes(box, **options)

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})
        points = 0.75 * self.width, 0.75 * self.height
        path.write_text(for_every_page(path.read_text(), *points))


def for_every_page(svg: str, width: float, height: float) -> str:
    """On a card, in the reader's fonts, with the colours of a dark page where the reader has one."""
    dark = "".join(
        f'[style*="{kind}: {light}"]{{{kind}:{color}!important}}'
        for light, color in DARK.items()
        for kind in ("fill", "stroke")
    )
    style = f"text{{font-family:{FONTS}!important}}\n@media (prefers-color-scheme:dark){{{dark}}}"
    size = f'width="{width - 1:g}" height="{height - 1:g}"'
    card = f'<rect x="0.5" y="0.5" {size} rx="6" style="fill: {CARD}; stroke: {FAINT}"/>'
    return re.sub(r"(<svg [^>]*>)", rf"\1\n <style>{style}</style>\n {card}", svg, count=1)


def name_of(row: Row) -> str:
    return f"{row['provider']}, {row['model']} {row['vocab_size']}x{row['rows']} {row['dtype']}{weights_of(row)}"


def weights_of(row: Row) -> str:
    """Where rows of the same provider differ in them."""
    return f" {row['weights']}" if "weights" in row else ""


def number(value: str) -> str:
    """Two digits below 10, else none behind the point."""
    return f"{float(value):.{2 if float(value) < 1 else 1 if float(value) < 10 else 0}f}"
