"""How the results of `bench/compare.py` look: a table on the terminal, one in Markdown, a plot. Measures nothing."""

# The library that draws is not in every environment.
# pyright: reportMissingImports=false

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

ENGINE = "atoma"

Rates = Mapping[str, Mapping[str, Sequence[float]]]  # tokens a second by engine and kind, one a round
Limits = Mapping[str, Sequence[float]]  # likewise, at most, by kind


def ratios(results: Rates) -> dict[str, dict[str, dict[str, float]]]:
    """This engine's rate over each peer's, within each round: median and extremes, by peer and kind."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name, rates in results.items():
        if name == ENGINE:
            continue
        found[name] = {}
        for kind, theirs in rates.items():
            quotients = [ours / other for ours, other in zip(results[ENGINE][kind], theirs, strict=True)]
            found[name][kind] = {
                "median": statistics.median(quotients),
                "min": min(quotients),
                "max": max(quotients),
            }
    return found


def share(results: Rates, limits: Limits, kind: str) -> float:
    """What this engine reaches of the machine's limit, within each round: the median."""
    return statistics.median(rate / most for rate, most in zip(results[ENGINE][kind], limits[kind], strict=True))


def report(results: Rates, limits: Limits | None = None) -> None:
    """Prints a table: medians in tokens a second; behind each peer's, this engine's ratio to it (min–max).

    Args:
        results: of `compare`.
        limits: of the machine, by kind, one a round; None where they are not known.
    """
    quotients = ratios(results)
    names = [ENGINE, *quotients]
    head = f"{'tokens/s':<15}{ENGINE:>9}" + (f"{'limit':>18}" if limits else "")
    print("\n" + head + "".join(f"{name:>32}" for name in quotients))
    for kind in results[ENGINE]:
        cells: list[str] = []
        for name in names:
            median = statistics.median(results[name][kind])
            cell = f"{median:9.1f}"
            if name != ENGINE:
                ratio = quotients[name][kind]
                cell += f"  ×{ratio['median']:.2f} ({ratio['min']:.2f}–{ratio['max']:.2f})".rjust(23)
            elif limits:
                cell += f"{statistics.median(limits[kind]):10.1f} ({share(results, limits, kind):4.0%})"
            cells.append(cell)
        print(f"{kind.replace('_', ' '):<15}" + "".join(cells))
    print(f"× = {ENGINE} / peer: above 1, this engine is faster.")


def markdown(results: Rates, limits: Limits | None, descriptions: Mapping[str, str]) -> str:
    """The same table in Markdown, with the engines' versions below it."""
    quotients = ratios(results)
    titles = ["tokens a second", ENGINE, *(["limit of the machine"] if limits else []), *quotients]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for kind, rates in results[ENGINE].items():
        median = statistics.median(rates)
        cells = [kind.replace("_", " "), f"{median:.1f}"]
        if limits:
            most = statistics.median(limits[kind])
            cells.append(f"{most:.1f}: {share(results, limits, kind):.0%} reached")
        for name, by_kind in quotients.items():
            ratio = by_kind[kind]
            theirs = statistics.median(results[name][kind])
            cells.append(f"{theirs:.1f}, ×{ratio['median']:.2f} ({ratio['min']:.2f}–{ratio['max']:.2f})")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", *(f"- {name}: {text}" for name, text in descriptions.items() if name in results), ""])


def plot(results: Rates, limits: Limits | None, path: Path) -> None:
    """Medians of each engine with their extremes, a panel a kind, and the machine's limit as a line.

    Raises:
        ImportError: matplotlib, of the extra `bench`, is not installed.
    """
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot

    kinds = list(results[ENGINE])
    figure, panels = pyplot.subplots(
        1, len(kinds), figsize=(3.2 * len(kinds), 3.6), layout="constrained", squeeze=False
    )
    for axes, kind in zip(panels[0], kinds, strict=True):
        for place, name in enumerate(results):
            rates = results[name][kind]
            median = statistics.median(rates)
            spread = [[median - min(rates)], [max(rates) - median]]
            axes.bar(place, median, yerr=spread, color="C0" if name == ENGINE else "C7", capsize=3)
        if limits:
            axes.axhline(statistics.median(limits[kind]), color="C3", linewidth=1, linestyle="--")
        axes.set_title(kind.replace("_", " "))
        axes.set_xticks(range(len(results)), list(results), rotation=30, ha="right")
        axes.set_ylim(bottom=0)
    panels[0][0].set_ylabel("tokens a second; dashed: limit of the machine" if limits else "tokens a second")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
