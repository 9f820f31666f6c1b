"""Attention maps as one figure: a row for each generated image, a column for each layer and each group of steps."""
from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn.functional import interpolate

from evaluation.attention.masked_attention import ALL, STEP_GROUPS, MaskedAttention

COLORMAP = "inferno"  # perceptually uniform, also for color-blind readers
TILE_PIXELS = 192  # the longer side of an image or a map before it goes into the figure
TILE_INCHES = 1.25
LEFT_MARGIN, TOP_MARGIN, BOTTOM_MARGIN = 2.15, 0.95, 0.7  # inches; row labels stand at the left
CAPTION_HEIGHT, COLUMN_GAP, GROUP_GAP = 0.22, 0.05, 0.14  # inches
TEXT_COLOR, NOTE_COLOR = "#222222", "#777777"
IMAGE_OPACITY = 0.3  # of the gray image under a map
MAX_PERCENTILE = 99.0  # of all densities; higher ones get the brightest color
BLOCK_NAMES = {"input_blocks": "in", "middle_block": "middle", "output_blocks": "out"}


@dataclass(frozen=True, eq=False)
class AttentionRow:
    """One generated image and its attention maps.

    Attributes:
        label: how the image was generated, on a line or two.
        notes: up to four lines below the label.
        image: the image, of any size.
        maps: layer's name -> (groups of steps, h, w).
        mask: (H, W) of ones and zeros; None: the object was not found.
        measured: the attention inside the mask; None without a mask.
    """

    label: str
    notes: str
    image: Image.Image
    maps: Mapping[str, Tensor]
    mask: Tensor | None = None
    measured: MaskedAttention | None = None


def attention_figure(rows: Sequence[AttentionRow], title: str) -> Image.Image:
    """Return a figure of all rows: the image, its mask, the mean map of each layer, and the mean map of all layers in
    the early, middle and late steps.

    Maps are shown as densities, with one color scale for all: 1 is attention that is uniform over the image.
    """
    layers = list(rows[0].maps)
    densities = [_densities(row) for row in rows]
    all_values = np.concatenate([np.ravel(density) for row in densities for density in row])
    maximum = max(2.0, float(np.percentile(all_values, MAX_PERCENTILE)))
    headings = ["generated", "mask", *[_layer_heading(name, rows[0].maps[name]) for name in layers],
                *[f"{group} steps,\nall layers" for group in STEP_GROUPS]]
    figure, axes = _make_grid(len(rows), len(headings), len(layers), rows[0].image)
    for row, row_densities, row_axes in zip(rows, densities, axes, strict=True):
        _fill_row(row_axes, row, row_densities, maximum)
    for axis, heading in zip(axes[0], headings, strict=True):
        axis.set_title(heading, fontsize=8.5, color=TEXT_COLOR, pad=5)
    figure.suptitle(title, x=0.01, y=1 - 0.12 / figure.get_figheight(), ha="left", fontsize=12, color=TEXT_COLOR)
    _add_color_bar(figure, maximum)
    return _render(figure)


def _densities(row: AttentionRow) -> list[np.ndarray]:
    """Return each map of a row in tile size, divided by its mean: one for each layer, then one for each step group."""
    size = _tile_size(row.image)
    by_layer = [_enlarge(maps.mean(0), size) for maps in row.maps.values()]
    by_steps = [sum(_enlarge(maps[group], size) for maps in row.maps.values()) for group in range(len(STEP_GROUPS))]
    return [tile / tile.mean() for tile in (*by_layer, *by_steps)]


def _tile_size(image: Image.Image) -> tuple[int, int]:
    """Return (height, width) in pixels."""
    factor = TILE_PIXELS / max(image.size)
    return round(image.height * factor), round(image.width * factor)


def _enlarge(values: Tensor, size: tuple[int, int]) -> np.ndarray:
    smooth = interpolate(values[None, None].float(), size=size, mode="bicubic", align_corners=False)
    return smooth[0, 0].clamp(min=0).numpy()


def _layer_heading(name: str, maps: Tensor) -> str:
    """Return, for example, "in 4" and "16×16" on two lines for input_blocks.4.1.transformer_blocks.0.attn2."""
    height, width = maps.shape[-2:]
    match = re.match(r"(\w+)\.(\d+)", name)
    if match is None:
        layer = name
    elif match[1] == "middle_block":
        layer = BLOCK_NAMES[match[1]]
    else:
        layer = f"{BLOCK_NAMES.get(match[1], match[1])} {match[2]}"
    return f"{layer}\n{height}×{width}"


def _make_grid(rows: int, columns: int, layers: int, image: Image.Image) -> tuple[Figure, np.ndarray]:
    """Return a figure and its (rows, columns) of empty axes, with a gap after the mask and one after the layers."""
    height, width = _tile_size(image)
    tile_width, tile_height = TILE_INCHES * width / TILE_PIXELS, TILE_INCHES * height / TILE_PIXELS
    row_height = tile_height + CAPTION_HEIGHT
    gap_columns = (2, 2 + layers)  # a gap stands before each of these columns
    figure_width = LEFT_MARGIN + columns * (tile_width + COLUMN_GAP) + len(set(gap_columns)) * GROUP_GAP + 0.1
    figure_height = TOP_MARGIN + rows * row_height + BOTTOM_MARGIN
    figure = Figure(figsize=(figure_width, figure_height), dpi=130, facecolor="white")
    axes = np.empty((rows, columns), dtype=object)
    for row, column in np.ndindex(rows, columns):
        gaps = sum(column >= start for start in gap_columns)
        left = LEFT_MARGIN + column * (tile_width + COLUMN_GAP) + gaps * GROUP_GAP
        bottom = figure_height - TOP_MARGIN - (row + 1) * row_height + CAPTION_HEIGHT
        axis = figure.add_axes((left / figure_width, bottom / figure_height, tile_width / figure_width,
                                tile_height / figure_height))
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
        axes[row, column] = axis
    return figure, axes


def _fill_row(axes: Sequence[Axes], row: AttentionRow, densities: Sequence[np.ndarray], maximum: float) -> None:
    height, width = _tile_size(row.image)
    image = row.image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
    mask = None if row.mask is None else _enlarge_mask(row.mask, (height, width))

    # The image, with label and notes at its left.
    axes[0].imshow(image)
    text_style = {"transform": axes[0].transAxes, "ha": "right", "fontsize": 8.5, "color": TEXT_COLOR,
                  "linespacing": 1.35}
    axes[0].text(-0.08, 1, row.label, va="top", weight="bold", **text_style)
    axes[0].text(-0.08, 0, row.notes, va="bottom", **text_style)

    # The masked image.
    axes[1].imshow(np.full((height, width, 3), 0.94) if mask is None else np.where(mask[..., None], image, 235))
    _add_caption(axes[1], "not found" if row.measured is None else f"{100 * row.measured.area:.0f} % of the area")

    # The maps, over the gray image.
    gray = np.asarray(ImageOps.grayscale(image), dtype=np.float32)[..., None] / 255
    for axis, density in zip(axes[2:], densities, strict=True):
        colors = colormaps[COLORMAP](np.clip(density / maximum, 0, 1))[..., :3]
        axis.imshow(IMAGE_OPACITY * gray + (1 - IMAGE_OPACITY) * colors)
        if mask is not None:
            axis.contour(mask, levels=[0.5], colors="white", linewidths=0.7)
    if row.measured is not None:
        selections = [*[(name, ALL) for name in row.maps], *[(ALL, group) for group in STEP_GROUPS]]
        for axis, (layer, steps) in zip(axes[2:], selections, strict=True):
            _add_caption(axis, f"{100 * row.measured.share(layer, steps):.0f} % inside")


def _enlarge_mask(mask: Tensor, size: tuple[int, int]) -> np.ndarray:
    return interpolate(mask[None, None].float(), size=size, mode="bilinear")[0, 0].numpy() > 0.5


def _add_caption(axis: Axes, text: str) -> None:
    axis.set_xlabel(text, fontsize=7.5, color=TEXT_COLOR, labelpad=2)


def _add_color_bar(figure: Figure, maximum: float) -> None:
    width, height = figure.get_size_inches()
    axis = figure.add_axes((LEFT_MARGIN / width, 0.42 / height, 2.6 / width, 0.1 / height))
    axis.imshow(np.linspace(0, 1, 256)[None], aspect="auto", cmap=COLORMAP, extent=(0, maximum, 0, 1))
    axis.set(yticks=[])
    axis.tick_params(labelsize=7.5, colors=TEXT_COLOR, length=2, pad=2)
    axis.spines[:].set_visible(False)
    figure.text((LEFT_MARGIN + 2.8) / width, 0.42 / height, "attention to the word, relative to uniform attention; "
                "the white line is the edge of the mask", fontsize=8, color=NOTE_COLOR, va="bottom")


def _render(figure: Figure) -> Image.Image:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
