"""A sweep as a picture: throughput against latency, one point a run. Measures nothing."""

# The library that draws is not in every environment.
# pyright: reportMissingImports=false

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from atoma_jax.errors import UserError

_PANELS = (("ttft", "time to first token, ms"), ("tpot", "time per output token, ms"), ("e2el", "end to end, ms"))


def check_plot(path: Path) -> None:
    """Raises `UserError` where nothing could be drawn after a long run: without the library, or into no folder."""
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise UserError("plot", str(path), "needs matplotlib: pip install matplotlib") from error
    mpl.use("agg")
    if path.suffix != ".png":
        raise UserError("plot", str(path), "must be a .png file")
    if not path.absolute().parent.is_dir():
        raise UserError("plot", str(path), "must be in a folder that exists")


def plot_sweep(runs: Sequence[Mapping[str, Any]], over: str, path: Path) -> None:
    """Median and highest percentile of each latency against the tokens generated a second.

    Args:
        runs: objects of `bench serve`, at least one of which has a completed request.
        over: the key whose value stands beside each point.
        path: a PNG file.
    """
    from matplotlib import pyplot

    shown = [run for run in runs if run["completed"]]
    figure, panels = pyplot.subplots(1, len(_PANELS), figsize=(11, 3.6), layout="constrained")
    for axes, (name, label) in zip(panels, _PANELS, strict=True):
        for kind, style in (("median", "o-"), ("p99", "s--")):
            key = f"{kind}_{name}_ms"
            points = [(run["output_throughput"], run[key], run[over]) for run in shown if run.get(key) is not None]
            axes.plot([x for x, _, _ in points], [y for _, y, _ in points], style, label=kind, markersize=4)
            if kind == "median":
                for x, y, value in points:
                    text = f"{value:g}" if isinstance(value, (int, float)) else str(value)
                    axes.annotate(text, (x, y), textcoords="offset points", xytext=(4, 4), fontsize=8)
        axes.set_xlabel("output tokens a second")
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
        axes.set_xlim(left=0)
        axes.grid(alpha=0.3)
    panels[0].legend()
    figure.suptitle(f"{shown[0]['model_id']}: {over.replace('_', ' ')} beside the points" if shown else "no run")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
