"""A picture of the kernel benchmark."""

from pathlib import Path

COLOURS = {
    "select": "#55a868",
    "estimate": "#c44e52",
    "top_p": "#8172b3",
    "union": "#64b5cd",
    "attend": "#ccb974",
    "decode": "#8c8c8c",  # all of them in one launch
    "rows": "#dd8452",  # dense, by our own kernel
}


def plot(rows: list[dict], path: Path) -> None:
    """Stack each shape's stages as a share of dense attention by `fa3` (our own without it)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [row for row in rows if "stages" in row]
    if not shown:
        return
    figure, axes = pyplot.subplots(figsize=(9, 0.6 * len(shown) + 1.6))
    labels = []
    for place, row in enumerate(shown):
        fa3 = row["others"].get("fa3", {})
        own = row["others"].get("own_dense", row["total"])  # itself where it is dense
        dense_us = fa3.get("p50_us", own["p50_us"])
        left = 0.0
        # Stages timed alone add up to a little more than the whole; scale them to it.
        alone = sum(stage["p50_us"] for stage in row["stages"].values())
        for name, stage in row["stages"].items():
            width = stage["p50_us"] / alone * row["total"]["p50_us"] / dense_us
            axes.barh(place, width, left=left, color=COLOURS[name])
            left += width
        text = f" {1 / left:.1f}x, {row['total']['p50_us']:.0f} of {dense_us:.0f} us"
        axes.text(left, place, text, va="center", fontsize=8)
        labels.append(row["shape"])
    for name, colour in COLOURS.items():
        axes.barh(0, 0, color=colour, label=name)
    axes.set_xlim(0, 1.5)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("time as a share of dense attention (fa3)")
    axes.set_title(f"{shown[0]['gpu']}, p = {shown[0]['p']:.2f}, B0 = {shown[0]['budget']}")
    axes.legend(fontsize=8, loc="center right")
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
