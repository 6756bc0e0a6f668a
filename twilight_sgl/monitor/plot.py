"""The monitor's heat maps as a picture."""

import io
from pathlib import Path

from twilight_sgl.errors import TwilightError
from twilight_sgl.monitor.figures import Figures


def plot(figures: Figures, path: Path) -> None:
    """Write kept fraction and kept mass by layer and KV head as a PNG file.

    Raises:
        TwilightError: there is no matplotlib, nothing to draw yet, or no way to write the file.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise TwilightError(f"--plot needs matplotlib: pip install matplotlib ({error})") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    if figures.kept_fraction is None or figures.kept_mass is None:
        raise TwilightError("--plot: no row has been sparse yet; send a request of long context")
    maps = (("kept fraction", figures.kept_fraction), ("kept mass", figures.kept_mass))
    figure, axes = pyplot.subplots(len(maps), 1, figsize=(9, 5), constrained_layout=True)
    places = range(0, len(figures.layer_ids), max(len(figures.layer_ids) // 16, 1))
    for axis, (name, values) in zip(axes, maps, strict=True):
        by_head = [list(row) for row in zip(*values, strict=True)]
        image = axis.imshow(by_head, aspect="auto", cmap="viridis", vmin=0, interpolation="nearest")
        axis.set_title(name)
        axis.set_ylabel("KV head")
        axis.set_yticks(range(len(by_head)))
        axis.set_xticks(places, [str(figures.layer_ids[place]) for place in places])
        figure.colorbar(image, ax=axis)
    axes[-1].set_xlabel("layer")
    figure.suptitle(f"{figures.model}, p = {figures.p:g}")
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=130)
    pyplot.close(figure)
    try:
        path.write_bytes(picture.getvalue())
    except OSError as error:
        raise TwilightError(f"--plot: cannot write {path}: {error.strerror}") from error
