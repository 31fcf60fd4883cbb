"""Figures of the measurements, with matplotlib (the optional extra `plot`)."""

from collections.abc import Sequence
from importlib import import_module
from statistics import median
from typing import TYPE_CHECKING

from nanoinfer.bench.latency import Floor, Latency
from nanoinfer.bench.machine import Limits
from nanoinfer.bench.ops import OpTime
from nanoinfer.bench.startup import Startup
from nanoinfer.bench.throughput import Throughput

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour-blind readers can tell apart.
COLORS = {"nanoinfer": "#0072B2", "hf": "#E69F00", "vllm": "#009E73", "sglang": "#CC79A7"}
FLOOR_COLOR = "#D55E00"
PHASES = {"python_s": "Python", "import_s": "import", "load_s": "load", "first_token_s": "first token"}
PHASE_COLORS = ("#BBBBBB", "#56B4E9", "#009E73", "#E69F00")


def check_matplotlib() -> None:
    """Raise SystemExit, before anything is measured, where matplotlib is missing."""
    try:
        import_module("matplotlib")
    except ModuleNotFoundError:
        raise SystemExit("--plot needs matplotlib: pip install 'nanoinfer[plot]' or pip install matplotlib") from None


def _figure(title: str, panels: int, width: float, height: float) -> "tuple[Figure, list[Axes]]":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    figure.suptitle(title, fontsize=8)
    axes = [figure.add_subplot(1, panels, i + 1) for i in range(panels)]
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _short(value: float) -> str:
    """Three significant digits, without exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def plot_throughput(path: str, title: str, rows: Sequence[Throughput], best: float) -> None:
    """Output tokens per second; the line is what the hardware allows."""
    figure, (ax,) = _figure(title, 1, 7.5, 1.9 + 0.55 * len(rows))
    values = [row.output_tokens_per_s for row in rows]
    names = [f"{row.engine} {row.version.split(' ')[0]}" for row in rows]
    bars = ax.barh(names, values, 0.6, color=[COLORS[row.engine] for row in rows])
    ax.bar_label(bars, [f"{_short(value)}  ({value / best:.1%})" for value in values], padding=4, fontsize=9)
    ax.axvline(best, color=FLOOR_COLOR, linestyle="--", linewidth=1.2)
    ax.set_title(f"hardware limit {_short(best)}", fontsize=8, color=FLOOR_COLOR, loc="right")
    ax.set_xlim(0, 1.02 * max(*(1.2 * value for value in values), best))
    ax.invert_yaxis()
    ax.xaxis.set_major_formatter("{x:,.0f}")
    ax.set_xlabel("output tokens/s")
    figure.savefig(path)


def plot_latency(path: str, title: str, rows: Sequence[Latency], floors: Sequence[Floor]) -> None:
    """Milliseconds of a decode step and of the prefill, side by side; the lines are the hardware's floor."""
    engines = {row.engine for row in rows}
    figure, axes = _figure(title, 2, 4.5 + (0.5 + 0.6 * len(engines)) * len(floors), 4.2)
    panels = (("decode_ms", "decode, ms per step"), ("prefill_ms", "prefill and first token, ms"))
    for ax, (field, label) in zip(axes, panels, strict=True):
        _grouped_bars(ax, rows, floors, field)
        ax.set_ylabel(label)
    figure.legend(*axes[0].get_legend_handles_labels(), frameon=False, fontsize=8, ncols=5, loc="outside lower center")
    figure.savefig(path)


def _grouped_bars(ax: "Axes", rows: Sequence[Latency], floors: Sequence[Floor], field: str) -> None:
    engines = list(dict.fromkeys(row.engine for row in rows))
    width = 0.8 / len(engines)
    for k, engine in enumerate(engines):
        found = {(row.batch, row.context): getattr(row, field) for row in rows if row.engine == engine}
        values = [found.get((floor.batch, floor.context), 0.0) for floor in floors]
        places = [i + (k - (len(engines) - 1) / 2) * width for i in range(len(floors))]
        bars = ax.bar(places, values, 0.92 * width, label=engine, color=COLORS[engine])
        ax.bar_label(bars, [_short(value) if value else "" for value in values], padding=2, fontsize=7)
    least = [getattr(floor, field) for floor in floors]
    ends = [i - 0.45 for i in range(len(floors))], [i + 0.45 for i in range(len(floors))]
    ax.hlines(least, *ends, color=FLOOR_COLOR, linestyle="--", linewidth=1.2, label="hardware floor")
    values = [getattr(row, field) for row in rows] + least
    if max(values) > 20 * min(values):
        ax.set_yscale("log")
        ax.set_ylim(min(values) / 2, 3 * max(values))
    else:
        ax.set_ylim(0, 1.25 * max(values))
    ax.set_xticks(range(len(floors)), [f"batch {floor.batch}\n{floor.context} tokens" for floor in floors], fontsize=8)


def plot_startup(path: str, title: str, rows: Sequence[Startup]) -> None:
    """Seconds to the first token by phase, the median of each engine's runs."""
    engines = list(dict.fromkeys(row.engine for row in rows))
    figure, (ax,) = _figure(title, 1, 7.5, 1.6 + 0.6 * len(engines))
    left = [0.0] * len(engines)
    for (field, label), color in zip(PHASES.items(), PHASE_COLORS, strict=True):
        values = [median(getattr(row, field) for row in rows if row.engine == engine) for engine in engines]
        bars = ax.barh(engines, values, 0.6, left=left, label=label, color=color)
        # A phase of less than a fifteenth of the longest start has no room for its number.
        widest = max(row.total_s for row in rows)
        ax.bar_label(bars, [_short(v) if v > widest / 15 else "" for v in values], label_type="center", fontsize=8)
        left = [a + b for a, b in zip(left, values, strict=True)]
    for place, total in enumerate(left):
        ax.annotate(f"{total:.1f} s", (total, place), (4, 0), textcoords="offset points", va="center", fontsize=9)
    ax.set_xlim(0, 1.12 * max(left))
    ax.invert_yaxis()
    ax.set_xlabel("seconds from the start of the process to the first token")
    ax.legend(frameon=False, fontsize=8, ncols=4, loc="lower right", bbox_to_anchor=(1, 1))
    figure.savefig(path)


def plot_ops(path: str, title: str, rows: Sequence[OpTime], limits: Limits) -> None:
    """Each op's share of the hardware's limit, a panel for each model and step."""
    groups = list(dict.fromkeys((row.shape, row.step) for row in rows))
    tallest = max(sum((row.shape, row.step) == group for row in rows) for group in groups)
    figure, axes = _figure(title, len(groups), 1.5 + 3.2 * len(groups), 1.5 + 0.25 * tallest)
    for ax, group in zip(axes, groups, strict=True):
        shown = [row for row in rows if (row.shape, row.step) == group and row.share_of(limits)]
        shares = [100 * row.share_of(limits) for row in shown]
        colors = [COLORS["nanoinfer"] if row.compiled else "#999999" for row in shown]
        bars = ax.barh([row.op for row in shown], shares, 0.7, color=colors)
        labels = [f"{share:.0f}%  {_short(row.microseconds)} us" for share, row in zip(shares, shown, strict=True)]
        ax.axvline(100, color=FLOOR_COLOR, linestyle="--", linewidth=1.2, zorder=0)
        paper = {"facecolor": "white", "edgecolor": "none", "pad": 1}
        ax.bar_label(bars, labels, padding=3, fontsize=7, bbox=paper)
        ax.set_xlim(0, 1.5 * max(100, *shares))
        ax.tick_params(axis="y", labelsize=7)
        ax.invert_yaxis()
        ax.set_title(" ".join(group), fontsize=8)
    figure.supxlabel("% of the hardware's limit; grey: by torch, not by a kernel of ours", fontsize=8)
    figure.savefig(path)
