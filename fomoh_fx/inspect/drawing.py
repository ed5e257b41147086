"""Drawing: a picture of a graph in layers, its nodes coloured by component."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

import networkx
from torch import fx

from fomoh_fx.errors import ArgumentError
from fomoh_fx.inspect.printing import described
from fomoh_fx.passes import provenance
from fomoh_fx.passes.dataflow import dependencies

COLOURS = {"primal": "#9aa5b1", "tangent": "#3f8ae0", "cross": "#e07b3f"}
PICTURES = (".png", ".pdf", ".svg", ".jpg")


def draw(module: fx.GraphModule, path: str | PathLike[str]) -> Path:
    """Write a picture of the graph and return its path.

    Args:
        module: a stage.
        path: ends in ``.png``, ``.pdf``, ``.svg`` or ``.jpg`` for a picture by matplotlib, in ``.dot`` for Graphviz,
            or in ``.graphml`` for other programs that read graphs.

    Raises:
        ArgumentError: another ending.
        ImportError: a picture was asked for, and matplotlib is not installed.
    """
    path = Path(path)
    if path.suffix not in (*PICTURES, ".dot", ".graphml"):
        raise ArgumentError(f"path: must end in one of {', '.join((*PICTURES, '.dot', '.graphml'))}, got {str(path)!r}")
    flow = layered(module)
    if path.suffix == ".dot":
        path.write_text(_dot(flow))
    elif path.suffix == ".graphml":
        networkx.write_graphml(flow, path)
    else:
        _picture(flow, path)
    return path


def layered(module: fx.GraphModule) -> networkx.DiGraph:
    """The dataflow graph by node names, each with its component, operator, value, source line, and layer."""
    nodes = dependencies(module.graph)
    flow: networkx.DiGraph = networkx.relabel_nodes(nodes, {node: node.name for node in nodes})
    for layer, names in enumerate(networkx.topological_generations(flow)):
        for name in names:
            flow.nodes[name]["layer"] = layer
    for node in nodes:
        origin = provenance.of(node)
        flow.nodes[node.name].update(
            component=origin.component,
            primal=origin.primal,
            operator=str(node.target),
            value=described(node.meta.get("val")),
            source=origin.source,
        )
    return flow


def _dot(flow: networkx.DiGraph) -> str:
    def quoted(text: str) -> str:
        return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'

    lines = ["digraph {", "  node [shape=box, style=filled, fontname=monospace]"]
    for name, about in flow.nodes(data=True):
        label = quoted(f"{name}\n{about['operator']}\n{about['value']}".strip()).replace("\n", "\\n")
        colour, tooltip = quoted(COLOURS[about["component"]]), quoted(about["source"])
        lines.append(f"  {quoted(name)} [label={label}, fillcolor={colour}, tooltip={tooltip}]")
    lines += [f"  {quoted(a)} -> {quoted(b)}" for a, b in flow.edges]
    return "\n".join([*lines, "}"]) + "\n"


def _picture(flow: networkx.DiGraph, path: Path) -> None:
    try:
        from matplotlib.figure import Figure
        from matplotlib.lines import Line2D
    except ImportError as error:
        raise ImportError(
            f"drawing {path.suffix} needs matplotlib: pip install 'fomoh-fx[examples]', or draw a .dot or .graphml file"
        ) from error
    positions = networkx.multipartite_layout(flow, subset_key="layer", align="horizontal")
    positions = {name: (x, -y) for name, (x, y) in positions.items()}  # the inputs at the top
    layers = list(networkx.get_node_attributes(flow, "layer").values())
    widest = max(layers.count(layer) for layer in set(layers))
    figure = Figure(figsize=(min(4 + 1.2 * widest, 60), min(3 + 0.5 * len(set(layers)), 120)))
    axes = figure.add_subplot()
    axes.set_axis_off()
    colours = [COLOURS[component] for component in networkx.get_node_attributes(flow, "component").values()]
    networkx.draw_networkx(
        flow, positions, ax=axes, node_color=colours, node_size=120, font_size=6, edge_color="#c8ccd0", arrowsize=6
    )
    handles = [Line2D([], [], marker="o", linestyle="", color=colour, label=c) for c, colour in COLOURS.items()]
    axes.legend(handles=handles, loc="upper right")
    figure.savefig(path, bbox_inches="tight")
