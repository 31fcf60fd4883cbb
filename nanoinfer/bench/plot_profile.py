"""The timeline of a decode step as a figure, with matplotlib."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from nanoinfer.bench.profile import Profile, Span

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours, which colour-blind readers can tell apart.
KIND_COLORS = {
    "linear": "#0072B2", "attention": "#D55E00", "rotary and store": "#E69F00", "norm": "#009E73",
    "activation": "#CC79A7", "sampling": "#56B4E9", "other": "#999999",
}  # fmt: skip


def plot_profile(path: str, title: str, profiles: Sequence[Profile]) -> None:
    """For each batch size the whole step, a lane for each kind of kernel, and below it one layer by name."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 1.0 + 4.2 * len(profiles)), dpi=150, layout="constrained")
    figure.suptitle(title, fontsize=8)
    axes = figure.subplots(2 * len(profiles), 1, squeeze=False, height_ratios=[3, 2] * len(profiles)).ravel()
    for i, profile in enumerate(profiles):
        _whole_step(axes[2 * i], profile)
        _one_layer(axes[2 * i + 1], profile)
    axes[-1].set_xlabel("microseconds")
    figure.savefig(path)


def _whole_step(ax: "Axes", profile: Profile) -> None:
    costs, lanes = profile.costs(), list(KIND_COLORS)
    for lane, kind in enumerate(lanes):
        bars = [(span.end - span.cost, span.cost) for span in profile.spans if span.kind == kind]
        ax.broken_barh(bars, (lane - 0.4, 0.8), color=KIND_COLORS[kind])
    ax.set_yticks(range(len(lanes)), [f"{kind}  {costs.get(kind, 0):.0f} us" for kind in lanes], fontsize=7)
    ax.invert_yaxis()
    ax.set_xlim(0, profile.step_us)
    what = f"batch {profile.batch}, {profile.context} tokens"
    times = (
        f"{profile.plain_us:.0f} us a step, {profile.step_us:.0f} under the profiler, {costs['idle']:.0f} of it idle"
    )
    ax.set_title(f"{what}: {times}", fontsize=8, loc="left")


def middle_layer(spans: Sequence[Span]) -> list[Span]:
    """The spans from one layer's attention to the next one's, in the middle of the step."""
    begins = [i for i, span in enumerate(spans) if span.name.startswith(("decode", "prefill"))]
    if len(begins) < 2:
        return list(spans)
    at = len(begins) // 2 - 1
    return list(spans[begins[at] : begins[at + 1]])


def _one_layer(ax: "Axes", profile: Profile) -> None:
    layer = middle_layer(profile.spans)
    origin = layer[0].end - layer[0].cost
    for i, span in enumerate(layer):
        left = span.end - span.cost - origin
        ax.broken_barh([(span.start - origin, span.end - span.start)], (i - 0.4, 0.8), color="#DDDDDD")
        ax.broken_barh([(left, span.cost)], (i - 0.4, 0.8), color=KIND_COLORS[span.kind])
        ax.annotate(
            f"{span.cost:.1f}", (span.end - origin, i), (3, 0), textcoords="offset points", va="center", fontsize=6
        )
    ax.set_yticks(range(len(layer)), [span.name[:28] for span in layer], fontsize=6)
    ax.invert_yaxis()
    ax.set_title("one layer; grey: started early, waiting for the kernel before", fontsize=7, loc="left")
