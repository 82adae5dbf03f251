"""One picture for the benchmark: measured curves, panels side by side."""

from matplotlib.figure import Figure

from files import write_whole


def plot_curves(path, panels, title):
    """Draw measured curves as a PNG. `panels` is a list of (x label, y label, {name: (x values, y values)})."""
    figure = Figure(figsize=(4.6 * len(panels), 3.6), layout="constrained")
    for axes, (x_label, y_label, curves) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for (name, (x, y)), style in zip(curves.items(), ("-o", "--", ":"), strict=False):
            axes.plot(x, y, style, label=name, markersize=4)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        axes.legend(fontsize=8, frameon=False)
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=11)
    write_whole(path, lambda out: figure.savefig(out, format="png", dpi=130))
