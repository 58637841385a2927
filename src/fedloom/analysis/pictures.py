"""Figures of an analysis: image grids, scatter plots and histograms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from fedloom.analysis.features import Floats, Numbers, Plane, Table
from fedloom.analysis.samples import Findings, Sheet
from fedloom.report.style import MUTED, SERIES, Axes, Figure, drawing, shorten

PER_CLASS = 4  # number of images per class, block and client in the grid
MOST_SHEETS, ABREAST = 4, 2  # maximum number of clients in the grid, and clients per row
NAMES = {"f_g": "global features f_g", "f_cs": "client-specific features f_cs", "body": "features of the body"}
MOST_NAMED = 12  # maximum number of legend entries in one column


def sample_grid(sheets: Sequence[Sheet], classes: Sequence[str]) -> Figure:
    """Draw generated images for two clients side by side, with one row per class.

    The grid also contains the nearest training images and, if there are any, the originals.
    """
    chosen = [sheets[k] for k in sorted({round(k) for k in np.linspace(0, len(sheets) - 1, MOST_SHEETS).tolist()})]
    pairs = [chosen[k : k + ABREAST] for k in range(0, len(chosen), ABREAST)]
    heights = [max(len(set(sheet.labels.tolist())) for sheet in pair) for pair in pairs]
    n_blocks = len(chosen[0].blocks)
    width = n_blocks * len(pairs[0])
    with drawing():
        figure = Figure(figsize=(0.5 + 1.5 * width, sum(0.5 + 0.37 * height for height in heights)))
        panels = figure.subplots(len(pairs), width, squeeze=False, height_ratios=heights)
        for axes in panels.flat[len(chosen) * n_blocks :]:
            axes.set_axis_off()
        for pair, row, height in zip(pairs, panels, heights, strict=True):
            for k, sheet in enumerate(pair):
                _draw_sheet(row[k * n_blocks : (k + 1) * n_blocks], sheet, classes, height)
    return figure


def _draw_sheet(panels: Sequence[Axes], sheet: Sheet, classes: Sequence[str], height: int) -> None:
    """Draw the blocks of one client. `height` is the number of rows for which there must be room."""
    labels = sorted(set(sheet.labels.tolist()))
    for axes, (title, images) in zip(panels, sheet.blocks.items(), strict=True):
        canvas = _montage(images, sheet.labels, labels, height)
        axes.imshow(canvas, cmap="gray", vmin=0, vmax=1, interpolation="nearest", aspect="equal")
        axes.set(xticks=[], yticks=[])
        axes.set_title(f"\n{title}", fontsize=8)
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
    side = images.shape[2] + 1
    names = [shorten(classes[label], 14) for label in labels]
    panels[0].set_yticks([side * k + side / 2 - 1 for k in range(len(labels))], names, fontsize=8)
    panels[0].set_title(f"client {sheet.client}\n{next(iter(sheet.blocks))}", fontsize=8)


def _montage(images: Tensor, labels: Tensor, rows: Sequence[int], n_rows: int) -> Floats:
    """Return the first images of each class, with one row per class, separated by one white pixel: (H, W) or (H, W, 3)."""
    channels, height, width = images.shape[1:]
    canvas = np.ones(((height + 1) * n_rows - 1, (width + 1) * PER_CLASS - 1, channels))
    for r, label in enumerate(rows):
        for k, image in enumerate(images[labels == label][:PER_CLASS]):
            top, left = r * (height + 1), k * (width + 1)
            canvas[top : top + height, left : left + width] = image.permute(1, 2, 0).numpy()
    return canvas if channels == 3 else canvas[:, :, 0]


def feature_planes(table: Table, planes: Mapping[str, Plane], classes: Sequence[str], title: str) -> Figure:
    """Draw the first two principal components of each kind of features, coloured by class and by client."""
    with drawing():
        figure = Figure(figsize=(8.6, 0.6 + 3.1 * len(planes)))
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
        panels = figure.subplots(len(planes), 2, squeeze=False)
        for (name, found), (left, right) in zip(planes.items(), panels, strict=True):
            _scatter(left, found, table.classes, [shorten(str(c), 14) for c in classes], f"{NAMES[name]}, by class")
            numbers = [str(i) for i in range(int(table.clients.max()) + 1)]
            _scatter(right, found, table.clients, numbers, f"{NAMES[name]}, by client")
    return figure


def _scatter(axes: Axes, found: Plane, groups: Numbers, names: Sequence[str], title: str) -> None:
    import matplotlib

    present = sorted(set(groups.tolist()))
    shades = matplotlib.colormaps["tab10" if len(present) <= 10 else "tab20"]
    order = np.random.default_rng(0).permutation(len(groups))  # random order, so that no group hides another
    place = {group: k for k, group in enumerate(present)}
    colours = [shades(place[group] % shades.N) for group in groups[order].tolist()]
    axes.scatter(found.points[order, 0], found.points[order, 1], s=9, c=colours, linewidths=0, alpha=0.75)
    axes.set(title=title, xticks=[], yticks=[])
    axes.set_xlabel(f"component 1 ({100 * found.explained[0]:.0f} %)")
    axes.set_ylabel(f"component 2 ({100 * found.explained[1]:.0f} %)")
    for group in present:
        axes.scatter([], [], s=18, color=shades(place[group] % shades.N), label=names[group])
    columns = 1 if len(present) <= MOST_NAMED else 2
    axes.legend(
        loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=7.5, ncols=columns, handletextpad=0.2
    )


def nearness(findings: Findings) -> Figure:
    """Draw histograms of the similarity of images to their client's nearest training image, for generated and held-out real images."""
    with drawing():
        figure = Figure(figsize=(8.6, 2.9))
        panels = figure.subplots(1, 2)
        for axes, key, title, unit in zip(panels, ("ssim", "psnr"), ("SSIM", "PSNR"), ("SSIM", "dB"), strict=True):
            sides = [(getattr(findings.made, key).numpy(), SERIES[1], "generated images")]
            if findings.held_out is not None:
                sides.insert(0, (getattr(findings.held_out, key).numpy(), MUTED, "held-out real images"))
            both = np.concatenate([values for values, _, _ in sides])
            bins = np.linspace(both.min(), both.max() + 1e-9, 31).tolist()
            for values, colour, label in sides:
                line = {"histtype": "step", "linewidth": 1.8} if colour != MUTED else {"alpha": 0.35}
                axes.hist(values, bins, color=colour, label=label, **line)
                axes.axvline(float(values.max()), color=colour, linestyle=":", linewidth=1.4)
            axes.set(title=f"{title} to the nearest training image", xlabel=unit, ylabel="images")
        panels[0].legend(frameon=False, fontsize=8, loc="upper left")
    return figure
