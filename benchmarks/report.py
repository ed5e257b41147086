"""Reports: a table on the terminal, JSON, pictures."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks.suite import BASE, settings_of

Row = dict[str, Any]


def table(rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns, the first to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def comparison(rows: Sequence[Row]) -> str:
    """One comparison: times over the base's, which are above 1 where the base is faster."""
    lines = [("contender", "time / ours", "quartiles", "ms", "error", "first call s")]
    for row in rows:
        if "seconds" not in row:
            continue
        ratio = row["ratio"]
        error = max(row["errors"].values(), default=0.0)
        lines.append(
            (
                row["contender"],
                f"{ratio['median']:.2f}",
                f"{ratio['low']:.2f} .. {ratio['high']:.2f}",
                f"{1e3 * row['seconds']:.2f}",
                f"{error:.0e}" + ("" if row["right"] else " WRONG") if row["errors"] else "",
                f"{row['prepare_seconds']:.1f}",
            )
        )
    return "\n".join([" ".join(title(rows[0])), table(lines), *left_out(rows)])


def memories(rows: Sequence[Row]) -> str:
    """The most that one repetition takes at once."""
    lines = [("contender", "allocated MiB", "process MiB")]
    for row in rows:
        if "peak_bytes" in row:
            process = row["process_peak_bytes"]
            resident = "" if process is None else f"{process / 2**20:.2f}"
            lines.append((row["contender"], f"{row['peak_bytes'] / 2**20:.2f}", resident))
    return "\n".join([" ".join(title(rows[0])), table(lines), *left_out(rows)])


def compiled(row: Row) -> str:
    """What compiling took and made."""
    lines = [
        ("transform", f"{row['transform_seconds']:.1f} s"),
        ("Inductor, cold", f"{row['compile_seconds']:.1f} s"),
        ("Inductor, cold, the primal alone", f"{row['primal_compile_seconds']:.1f} s"),
        ("nodes, by stage", ", ".join(f"{name} {count}" for name, count in row["nodes"].items())),
        ("final nodes / normalize", f"{row['nodes_ratio']:.2f}"),
        ("kernels / the primal's", f"{row['kernels']} / {row['primal_kernels']} = {row['kernels_ratio']:.2f}"),
        ("products, by component", ", ".join(f"{name} {count}" for name, count in row["products"].items())),
        ("GFLOP of the products", f"{row['gigaflops']:.3f}"),
    ]
    width = max(len(name) for name, _ in lines)
    return "\n".join([" ".join(title(row)), *(f"  {name.ljust(width)}  {value}" for name, value in lines)])


def left_out(rows: Sequence[Row]) -> list[str]:
    reasons = {row["contender"]: row.get("absent") or row.get("failed") for row in rows}
    notes = [f"  {name}: {reason}" for name, reason in reasons.items() if reason]
    return ["  left out:", *notes] if notes else []


def title(row: Row) -> list[str]:
    parts = [row["work"], row["model"], f"batch {row['batch']}"]
    if row["directions"]:
        parts.append(f"K = {row['directions']}")
    if row["curvature"]:
        parts.append(row["curvature"])
    return [*parts, *([f"rank {row['rank']}"] if row["rank"] else [])]


def write(path: Path, machine: Row, rows: Sequence[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine, "rows": list(rows)}, indent=1, default=str) + "\n")


def grouped(rows: Iterable[Row]) -> list[list[Row]]:
    return [list(group) for _, group in groupby(rows, key=settings_of)]


def picture(rows: Sequence[Row], path: Path) -> None:
    """Bars of the ratios, one panel for each comparison, with the quartiles."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, NullFormatter

    panels = [[row for row in group if "ratio" in row and row["contender"] != BASE] for group in grouped(rows)]
    panels = [panel for panel in panels if panel]
    if not panels:
        return
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(6 * columns, 0.6 + 3.2 * lines), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis, panel in zip(axes.flat, panels, strict=False):
        middles = [row["ratio"]["median"] for row in panel]
        spread = [
            [row["ratio"]["median"] - row["ratio"]["low"] for row in panel],
            [row["ratio"]["high"] - row["ratio"]["median"] for row in panel],
        ]
        names = [row["contender"] + ("" if row["right"] else " (wrong)") for row in panel]
        axis.barh(names, middles, xerr=spread, color=["C0" if row["right"] else "C3" for row in panel])
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.invert_yaxis()
        axis.set_title(" ".join(title(panel[0])), fontsize=9)
        axis.tick_params(labelsize=8)
        axis.set_xlabel(f"time / {BASE}", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def curves(rows: Sequence[Row], x: str, y: str, path: Path, scale: float = 1.0, label: str | None = None) -> None:
    """``y`` over ``x``, a line for each contender."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 5))
    for name in dict.fromkeys(row["contender"] for row in rows):
        points = sorted((row[x], row[y] * scale) for row in rows if row["contender"] == name and row.get(y) is not None)
        if points:
            axis.plot(*zip(*points, strict=True), marker="o", label=name)
    axis.set_xlabel(x)
    axis.set_ylabel(label or y)
    axis.set_ylim(bottom=0)
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
