"""Attention maps as one picture: a row for each drawn picture, a column for each layer and each group of steps."""
from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Canvas
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn.functional import interpolate

from evaluation.attention.inside import ALL, STEPS, Inside

COLORS = "inferno"  # even steps to the eye, and to one that does not see colours
TILE = 192  # pixels on the longer side of a tile before it is laid out
INCHES = 1.25  # of a tile
LEFT = 2.15  # inches for the labels of rows
TEXT, FAINT = "#222222", "#777777"
SHOWN_THROUGH = 0.3  # of the picture, in grey, under a map
BRIGHTEST = 99.0  # percentile of all densities at which colours end
PARTS = {"input_blocks": "in", "middle_block": "middle", "output_blocks": "out"}


@dataclass(frozen=True, eq=False)
class Row:
    """One drawn picture and what was seen in it.

    Attributes:
        label: how it was drawn; a line of text or two.
        notes: up to four lines below that.
        picture: of any size.
        maps: layer name -> (groups of steps, h, w).
        mask: (H, W) of ones and zeros; None: the thing was not found.
        inside: their figures; None without a mask.
    """

    label: str
    notes: str
    picture: Image.Image
    maps: Mapping[str, Tensor]
    mask: Tensor | None = None
    inside: Inside | None = None


def attention_figure(rows: Sequence[Row], title: str) -> Image.Image:
    """All rows under each other: the picture, its mask, the mean map of each layer, and that of all at early, middle
    and late steps.

    Maps are shown as densities, in one scale for all: 1 is attention that is spread evenly over the picture.
    """
    layers = list(rows[0].maps)
    tiles = [_densities(row) for row in rows]
    brightest = max(2.0, float(np.percentile(np.concatenate([np.ravel(tile) for row in tiles for tile in row]),
                                             BRIGHTEST)))
    columns = ["drawn", "mask", *[_layer_title(name, rows[0].maps[name]) for name in layers],
               *[f"{steps} steps,\nall layers" for steps in STEPS]]
    canvas, axes = _grid(len(rows), len(columns), len(layers), rows[0].picture)
    for row, densities, line in zip(rows, tiles, axes, strict=True):
        _fill(line, row, densities, brightest)
    for axis, heading in zip(axes[0], columns, strict=True):
        axis.set_title(heading, fontsize=8.5, color=TEXT, pad=5)
    canvas.suptitle(title, x=0.01, y=1 - 0.12 / canvas.get_figheight(), ha="left", fontsize=12, color=TEXT)
    _color_bar(canvas, brightest)
    return _rendered(canvas)


def _densities(row: Row) -> list[np.ndarray]:
    """Each map of a row in tile size, divided by its mean: by layer, then by steps."""
    size = _tile_size(row.picture)
    by_layer = [_enlarged(row.maps[name].mean(0), size) for name in row.maps]
    by_steps = [sum(_enlarged(maps[group], size) for maps in row.maps.values()) for group in range(len(STEPS))]
    return [tile / tile.mean() for tile in (*by_layer, *by_steps)]


def _tile_size(picture: Image.Image) -> tuple[int, int]:
    """(height, width)."""
    factor = TILE / max(picture.size)
    return round(picture.height * factor), round(picture.width * factor)


def _enlarged(values: Tensor, size: tuple[int, int]) -> np.ndarray:
    smooth = interpolate(values[None, None].float(), size=size, mode="bicubic", align_corners=False)
    return smooth[0, 0].clamp(min=0).numpy()


def _layer_title(name: str, maps: Tensor) -> str:
    """Such as "in 4, 16x16" of input_blocks.4.1.transformer_blocks.0.attn2."""
    height, width = maps.shape[-2:]
    found = re.match(r"(\w+)\.(\d+)", name)
    part = PARTS.get(found[1], found[1]) if found else name
    where = part if not found or part == "middle" else f"{part} {found[2]}"
    return f"{where}\n{height}×{width}"


def _grid(rows: int, columns: int, layers: int, picture: Image.Image) -> tuple[Canvas, np.ndarray]:
    """A canvas and its (rows, columns) of empty axes, with gaps after the mask and after the layers."""
    height, width = _tile_size(picture)
    across, down = INCHES * width / TILE, INCHES * height / TILE + 0.22
    left, top, bottom = LEFT, 0.95, 0.7
    gaps = {2: 0.14, 2 + layers: 0.14}
    shape = left + columns * (across + 0.05) + sum(gaps.values()) + 0.1, top + rows * down + bottom
    canvas = Canvas(figsize=shape, dpi=130, facecolor="white")
    axes = np.empty((rows, columns), dtype=object)
    for place in np.ndindex(rows, columns):
        x = left + place[1] * (across + 0.05) + sum(gap for start, gap in gaps.items() if place[1] >= start)
        y = shape[1] - top - (place[0] + 1) * down + 0.22
        axes[place] = canvas.add_axes((x / shape[0], y / shape[1], across / shape[0], (down - 0.22) / shape[1]))
        axes[place].set(xticks=[], yticks=[])
        axes[place].spines[:].set_visible(False)
    return canvas, axes


def _fill(line: Sequence[Axes], row: Row, densities: Sequence[np.ndarray], brightest: float) -> None:
    height, width = _tile_size(row.picture)
    picture = row.picture.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
    grey = np.asarray(ImageOps.grayscale(picture), dtype=np.float32)[..., None] / 255
    mask = None if row.mask is None else _enlarged_mask(row.mask, (height, width))
    line[0].imshow(picture)
    for height_of, text, look in ((1, row.label, {"va": "top", "weight": "bold"}), (0, row.notes, {"va": "bottom"})):
        line[0].text(-0.08, height_of, text, transform=line[0].transAxes, ha="right", fontsize=8.5, color=TEXT,
                     linespacing=1.35, **look)
    line[1].imshow(np.full((height, width, 3), 0.94) if mask is None else np.where(mask[..., None], picture, 235))
    _caption(line[1], "not found" if row.inside is None else f"{100 * row.inside.area:.0f} % of the area")
    for axis, density in zip(line[2:], densities, strict=True):
        colors = colormaps[COLORS](np.clip(density / brightest, 0, 1))[..., :3]
        axis.imshow(SHOWN_THROUGH * grey + (1 - SHOWN_THROUGH) * colors)
        if mask is not None:
            axis.contour(mask, levels=[0.5], colors="white", linewidths=0.7)
    if row.inside is not None:
        places = [*[(name, ALL) for name in row.maps], *[(ALL, steps) for steps in STEPS]]
        for axis, place in zip(line[2:], places, strict=True):
            _caption(axis, f"{100 * row.inside.share(*place):.0f} % inside")


def _enlarged_mask(mask: Tensor, size: tuple[int, int]) -> np.ndarray:
    return interpolate(mask[None, None].float(), size=size, mode="bilinear")[0, 0].numpy() > 0.5


def _caption(axis: Axes, text: str) -> None:
    axis.set_xlabel(text, fontsize=7.5, color=TEXT, labelpad=2)


def _color_bar(canvas: Canvas, brightest: float) -> None:
    width, height = canvas.get_size_inches()
    axis = canvas.add_axes((LEFT / width, 0.42 / height, 2.6 / width, 0.1 / height))
    axis.imshow(np.linspace(0, 1, 256)[None], aspect="auto", cmap=COLORS, extent=(0, brightest, 0, 1))
    axis.set(yticks=[])
    axis.tick_params(labelsize=7.5, colors=TEXT, length=2, pad=2)
    axis.spines[:].set_visible(False)
    canvas.text((LEFT + 2.8) / width, 0.42 / height, "attention to the word, as a multiple of an even spread over the "
                "picture; the white line is the mask's edge", fontsize=8, color=FAINT, va="bottom")


def _rendered(canvas: Canvas) -> Image.Image:
    drawn = FigureCanvasAgg(canvas)
    drawn.draw()
    return Image.fromarray(np.asarray(drawn.buffer_rgba())).convert("RGB")
