"""The backgrounds of the mini world: small, smooth landscapes, painted with random numbers.

Nothing in them is finer than a few pixels: it would only use up the capacity of a small autoencoder.
"""
from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

Rng = np.random.Generator
Color = tuple[int, int, int]
OVERSAMPLE = 3


class Canvas:
    """A square image, painted at `OVERSAMPLE` times its size. All coordinates are fractions of its side.

    Args:
        size: side of the finished image, in pixels.
        top: color of the top; it changes linearly to `bottom`.
        bottom: color from the horizon on.
        horizon: position of the horizon, from the top.
    """

    def __init__(self, size: int, top: Color, bottom: Color, horizon: float = 1.0) -> None:
        self.side = size * OVERSAMPLE
        self.size = size
        ramp = np.clip(np.linspace(0, 1 / horizon, self.side, dtype=np.float32), 0, 1)[:, None]
        rows = np.array(top, np.float32) * (1 - ramp) + np.array(bottom, np.float32) * ramp
        self.image = Image.fromarray(np.repeat(rows[:, None].astype(np.uint8), self.side, axis=1))
        self.pen = ImageDraw.Draw(self.image)

    def polygon(self, points: list[tuple[float, float]], color: Color) -> None:
        self.pen.polygon([(x * self.side, y * self.side) for x, y in points], fill=color)

    def ellipse(self, x: float, y: float, rx: float, ry: float, color: Color) -> None:
        self.pen.ellipse([(x - rx) * self.side, (y - ry) * self.side, (x + rx) * self.side, (y + ry) * self.side],
                         fill=color)

    def box(self, left: float, top: float, right: float, bottom: float, color: Color) -> None:
        self.pen.rectangle([left * self.side, top * self.side, right * self.side, bottom * self.side], fill=color)

    def hills(self, rng: Rng, level: float, height: float, color: Color, waves: float = 1.5) -> None:
        """Fill everything below a smooth wavy line around `level`."""
        x = np.linspace(0, 1, 24)
        phase = rng.uniform(0, 6.3, 2)
        y = level + height * (np.sin(6.3 * waves * x + phase[0]) + 0.5 * np.sin(6.3 * 1.9 * waves * x + phase[1])) / 1.5
        self.polygon([(0, 1), *zip(x, y, strict=True), (1, 1)], color)

    def finish(self) -> Image.Image:
        """Return the image, blurred a little and reduced to its size."""
        return self.image.filter(ImageFilter.GaussianBlur(OVERSAMPLE * 0.5)).resize(
            (self.size, self.size), Image.Resampling.BOX)


def _vary(rng: Rng, color: Color, spread: int = 12) -> Color:
    """Return a random color whose channels differ from those of `color` by at most `spread`."""
    return tuple(int(value) for value in np.clip(np.add(color, rng.integers(-spread, spread + 1, 3)), 0, 255))


def beach(rng: Rng, size: int) -> Image.Image:
    canvas = Canvas(size, _vary(rng, (120, 195, 245)), _vary(rng, (205, 235, 250)), horizon=0.45)
    sea, sand = rng.uniform(0.36, 0.46), rng.uniform(0.56, 0.66)
    if rng.random() < 0.6:
        canvas.ellipse(rng.uniform(0.1, 0.9), rng.uniform(0.08, 0.2), 0.07, 0.07, (255, 240, 150))
    canvas.box(0, sea, 1, 1, _vary(rng, (30, 120, 195)))
    canvas.box(0, (sea + sand) / 2, 1, 1, _vary(rng, (60, 165, 215)))
    canvas.hills(rng, sand - 0.015, 0.012, (235, 248, 250), waves=2.0)
    canvas.hills(rng, sand + 0.02, 0.015, _vary(rng, (240, 214, 150)), waves=2.0)
    return canvas.finish()


def snow(rng: Rng, size: int) -> Image.Image:
    canvas = Canvas(size, _vary(rng, (150, 175, 205)), _vary(rng, (215, 225, 238)), horizon=0.6)
    for _ in range(rng.integers(2, 5)):
        x, base, tall = rng.uniform(0, 1), rng.uniform(0.55, 0.64), rng.uniform(0.2, 0.35)
        for step in range(3):
            top = base - tall * (0.4 + 0.3 * step)
            half = 0.11 - 0.027 * step
            canvas.polygon([(x - half, top + tall * 0.38), (x, top), (x + half, top + tall * 0.38)], (70, 105, 100))
    canvas.hills(rng, rng.uniform(0.56, 0.66), 0.03, _vary(rng, (242, 246, 252), 5))
    for x, y in rng.uniform(0, 1, (14, 2)):
        canvas.ellipse(x, y, 0.013, 0.013, (255, 255, 255))
    return canvas.finish()


def meadow(rng: Rng, size: int) -> Image.Image:
    canvas = Canvas(size, _vary(rng, (135, 205, 250)), _vary(rng, (215, 240, 250)), horizon=0.55)
    for _ in range(rng.integers(1, 4)):
        x, y = rng.uniform(0, 1), rng.uniform(0.08, 0.28)
        for dx in (-0.07, 0, 0.07):
            canvas.ellipse(x + dx, y, 0.08, 0.045, (250, 252, 255))
    canvas.hills(rng, rng.uniform(0.48, 0.58), 0.04, _vary(rng, (140, 205, 95)))
    canvas.hills(rng, rng.uniform(0.62, 0.7), 0.03, _vary(rng, (95, 175, 65)))
    for x, y in rng.uniform((0, 0.75), (1, 1), (rng.integers(4, 9), 2)):
        canvas.ellipse(x, y, 0.02, 0.02, ((250, 235, 90), (250, 250, 250), (240, 120, 150))[rng.integers(3)])
    return canvas.finish()


def desert(rng: Rng, size: int) -> Image.Image:
    canvas = Canvas(size, _vary(rng, (245, 185, 110)), _vary(rng, (252, 225, 165)), horizon=0.5)
    canvas.ellipse(rng.uniform(0.15, 0.85), rng.uniform(0.14, 0.26), 0.09, 0.09, (255, 245, 200))
    canvas.hills(rng, rng.uniform(0.46, 0.54), 0.06, _vary(rng, (225, 150, 80)), waves=0.9)
    canvas.hills(rng, rng.uniform(0.6, 0.68), 0.05, _vary(rng, (205, 120, 60)), waves=0.7)
    canvas.hills(rng, rng.uniform(0.8, 0.86), 0.04, _vary(rng, (188, 100, 48)), waves=0.8)
    return canvas.finish()


def forest(rng: Rng, size: int) -> Image.Image:
    canvas = Canvas(size, _vary(rng, (30, 80, 50)), _vary(rng, (80, 140, 80)), horizon=0.7)
    for shade, count in ((0.65, 6), (1.0, 5)):
        for x in rng.uniform(0, 1, count):
            half = rng.uniform(0.025, 0.05)
            canvas.box(x - half, 0, x + half, 0.76, tuple(int(shade * c) for c in _vary(rng, (98, 68, 42))))
    for x in rng.uniform(0, 1, 9):
        canvas.ellipse(x, rng.uniform(-0.02, 0.08), 0.16, 0.1, _vary(rng, (35, 105, 50)))
    canvas.hills(rng, rng.uniform(0.68, 0.76), 0.02, _vary(rng, (55, 92, 40)))
    return canvas.finish()


def sea(rng: Rng, size: int) -> Image.Image:
    canvas = Canvas(size, _vary(rng, (50, 175, 210)), _vary(rng, (8, 50, 120)))
    for x in rng.uniform(0, 1, 3):
        canvas.polygon([(x, 0), (x + 0.1, 0), (x + 0.02, 0.8), (x - 0.14, 0.8)], _vary(rng, (60, 165, 205), 6))
    canvas.hills(rng, rng.uniform(0.84, 0.9), 0.02, _vary(rng, (150, 150, 110)))
    for x in rng.uniform(0, 1, 4):
        height = rng.uniform(0.12, 0.3)
        sway = np.sin(np.linspace(0, 6, 8)) * 0.015
        spine = [(x + s, 0.92 - height * i / 7) for i, s in enumerate(sway)]
        canvas.polygon(spine + [(px + 0.03, py) for px, py in reversed(spine)], _vary(rng, (40, 150, 90)))
    for x, y in rng.uniform(0, 0.8, (7, 2)):
        canvas.ellipse(x, y, 0.016, 0.016, (190, 235, 245))
    return canvas.finish()


def city(rng: Rng, size: int) -> Image.Image:
    canvas = Canvas(size, _vary(rng, (150, 165, 190)), _vary(rng, (225, 215, 210)), horizon=0.7)
    left = -0.05
    while left < 1:
        wide, top = rng.uniform(0.14, 0.24), rng.uniform(0.1, 0.4)
        wall = _vary(rng, ((120, 105, 110), (95, 110, 130), (150, 120, 105))[rng.integers(3)])
        canvas.box(left, top, left + wide, 0.74, wall)
        for x in np.arange(left + 0.03, left + wide - 0.04, 0.065):
            for y in np.arange(top + 0.05, 0.62, 0.11):
                canvas.box(x, y, x + 0.032, y + 0.05, (250, 230, 150) if rng.random() < 0.5 else (70, 80, 100))
        left += wide + 0.01
    canvas.box(0, 0.72, 1, 0.78, (175, 172, 170))
    canvas.box(0, 0.78, 1, 1, _vary(rng, (72, 74, 80)))
    for x in np.arange(rng.uniform(-0.2, 0), 1, 0.28):
        canvas.box(x, 0.88, x + 0.14, 0.905, (235, 225, 180))
    return canvas.finish()


def mountains(rng: Rng, size: int) -> Image.Image:
    canvas = Canvas(size, _vary(rng, (110, 150, 215)), _vary(rng, (240, 205, 200)), horizon=0.6)
    for _ in range(4):
        x, top, half = rng.uniform(0, 1), rng.uniform(0.12, 0.32), rng.uniform(0.25, 0.4)
        slope = (0.72 - top) / half
        canvas.polygon([(x - half, 0.72), (x, top), (x + half, 0.72)], _vary(rng, (92, 98, 125)))
        cap = 0.1 / slope
        canvas.polygon([(x - cap, top + 0.1), (x, top), (x + cap, top + 0.1), (x, top + 0.07)], (245, 248, 252))
    canvas.hills(rng, rng.uniform(0.66, 0.72), 0.02, _vary(rng, (80, 120, 85)))
    return canvas.finish()


def table(rng: Rng, size: int) -> Image.Image:
    wall = ((235, 225, 205), (205, 222, 215), (220, 205, 215))[rng.integers(3)]
    canvas = Canvas(size, _vary(rng, wall), _vary(rng, wall))
    edge, wood = rng.uniform(0.58, 0.68), _vary(rng, (165, 105, 60))
    x = rng.uniform(0.1, 0.6)
    canvas.box(x, 0.08, x + 0.3, 0.4, (250, 250, 248))
    canvas.box(x + 0.02, 0.1, x + 0.28, 0.38, _vary(rng, (160, 205, 235)))
    canvas.box(0, edge, 1, 1, wood)
    for y in np.linspace(edge + 0.09, 0.97, 4):
        canvas.box(0, y, 1, y + 0.012, tuple(int(c * 0.78) for c in wood))
    canvas.box(0, edge, 1, edge + 0.025, tuple(min(255, int(c * 1.2)) for c in wood))
    return canvas.finish()


def space(rng: Rng, size: int) -> Image.Image:
    canvas = Canvas(size, _vary(rng, (12, 10, 38)), _vary(rng, (38, 18, 70)))
    x, y, radius = rng.uniform(0.05, 0.95), rng.uniform(0.05, 0.35), rng.uniform(0.08, 0.16)
    color = ((215, 150, 90), (120, 160, 215), (190, 110, 150))[rng.integers(3)]
    canvas.ellipse(x, y, radius * 1.7, radius * 0.35, _vary(rng, (200, 190, 160)))
    canvas.ellipse(x, y, radius, radius, _vary(rng, color))
    for sx, sy in rng.uniform(0, 1, (28, 2)):
        canvas.ellipse(sx, sy, 0.011, 0.011, (250, 250, 225))
    return canvas.finish()


def night(rng: Rng, size: int) -> Image.Image:
    canvas = Canvas(size, _vary(rng, (10, 18, 60), 6), _vary(rng, (40, 60, 120), 6), horizon=0.7)
    for x, y in rng.uniform((0, 0), (1, 0.5), (14, 2)):
        canvas.ellipse(x, y, 0.01, 0.01, (250, 250, 220))
    x, y = rng.uniform(0.12, 0.88), rng.uniform(0.1, 0.2)
    canvas.ellipse(x, y, 0.09, 0.09, (250, 245, 205))
    canvas.ellipse(x + 0.045, y - 0.02, 0.075, 0.075, (20, 30, 75))
    canvas.hills(rng, rng.uniform(0.6, 0.68), 0.05, _vary(rng, (18, 34, 50), 6))
    canvas.hills(rng, rng.uniform(0.76, 0.82), 0.03, _vary(rng, (10, 22, 32), 5))
    return canvas.finish()


def sunset(rng: Rng, size: int) -> Image.Image:
    canvas = Canvas(size, _vary(rng, (120, 50, 120)), _vary(rng, (255, 165, 70)), horizon=0.6)
    x = rng.uniform(0.2, 0.8)
    canvas.ellipse(x, 0.56, 0.17, 0.17, (255, 225, 120))
    canvas.box(0, 0.6, 1, 1, _vary(rng, (110, 50, 95)))
    for number, y in enumerate(np.linspace(0.64, 0.95, 5)):
        half = 0.17 - 0.02 * number + rng.uniform(0, 0.05)
        canvas.box(x - half, y, x + half, y + 0.025, (250, 170, 90))
    return canvas.finish()


def garden(rng: Rng, size: int) -> Image.Image:
    canvas = Canvas(size, _vary(rng, (165, 215, 245)), _vary(rng, (225, 240, 245)), horizon=0.4)
    for x in rng.uniform(0, 1, 8):
        canvas.ellipse(x, rng.uniform(0.3, 0.36), 0.14, 0.12, _vary(rng, (50, 130, 60)))
    canvas.box(0, 0.36, 1, 0.6, _vary(rng, (60, 140, 65)))
    for x in np.arange(rng.uniform(-0.05, 0.03), 1, 0.12):
        canvas.polygon([(x, 0.7), (x, 0.36), (x + 0.04, 0.31), (x + 0.08, 0.36), (x + 0.08, 0.7)], (250, 250, 245))
    canvas.box(0, 0.46, 1, 0.5, (235, 235, 230))
    canvas.box(0, 0.68, 1, 1, _vary(rng, (120, 190, 80)))
    for x, y in rng.uniform((0, 0.72), (1, 1), (10, 2)):
        canvas.ellipse(x, y, 0.03, 0.03, ((235, 60, 80), (250, 210, 60), (200, 90, 210))[rng.integers(3)])
    return canvas.finish()


def kitchen(rng: Rng, size: int) -> Image.Image:
    tile = ((225, 240, 240), (245, 240, 220), (225, 235, 250))[rng.integers(3)]
    canvas = Canvas(size, tile, tile)
    for at in np.arange(rng.uniform(0, 0.1), 1, 0.14):
        canvas.box(at, 0, at + 0.014, 0.64, (185, 200, 205))
        canvas.box(0, at * 0.64, 1, at * 0.64 + 0.014, (185, 200, 205))
    cupboard = _vary(rng, ((110, 160, 150), (190, 120, 90), (120, 130, 170))[rng.integers(3)])
    canvas.box(0, 0, 1, 0.14, cupboard)
    canvas.box(0, 0.62, 1, 0.7, _vary(rng, (95, 95, 105)))
    canvas.box(0, 0.7, 1, 1, cupboard)
    for x in np.arange(rng.uniform(0.1, 0.3), 1, 0.34):
        canvas.box(x, 0.72, x + 0.015, 1, (60, 65, 70))
        canvas.ellipse(x - 0.05, 0.8, 0.02, 0.02, (240, 225, 150))
    return canvas.finish()


def library(rng: Rng, size: int) -> Image.Image:
    canvas = Canvas(size, (95, 60, 35), (80, 48, 28))
    spines = ((170, 50, 45), (45, 90, 140), (60, 120, 75), (205, 165, 75), (110, 60, 120), (225, 215, 190))
    for shelf in (0.02, 0.26, 0.5):
        left = rng.uniform(-0.04, 0)
        while left < 1:
            wide, tall = rng.uniform(0.045, 0.08), rng.uniform(0.15, 0.2)
            canvas.box(left, shelf + 0.2 - tall, left + wide, shelf + 0.2, _vary(rng, spines[rng.integers(6)]))
            left += wide + 0.008
        canvas.box(0, shelf + 0.2, 1, shelf + 0.235, (140, 92, 55))
    canvas.box(0, 0.76, 1, 1, _vary(rng, (120, 45, 50)))
    return canvas.finish()


def road(rng: Rng, size: int) -> Image.Image:
    canvas = Canvas(size, _vary(rng, (120, 190, 240)), _vary(rng, (220, 235, 245)), horizon=0.45)
    canvas.hills(rng, 0.43, 0.02, _vary(rng, (95, 150, 90)))
    canvas.box(0, 0.46, 1, 1, _vary(rng, (130, 180, 80)))
    x = rng.uniform(0.42, 0.58)
    canvas.polygon([(x - 0.03, 0.45), (x + 0.03, 0.45), (1.1, 1), (-0.1, 1)], _vary(rng, (90, 92, 98)))
    for near in (0.2, 0.42, 0.72):
        y, half = 0.45 + 0.55 * near, 0.004 + 0.03 * near
        canvas.polygon([(x - half, y), (x + half, y), (x + 1.4 * half, y + 0.14 * near + 0.03),
                        (x - 1.4 * half, y + 0.14 * near + 0.03)], (250, 240, 200))
    return canvas.finish()


def cave(rng: Rng, size: int) -> Image.Image:
    canvas = Canvas(size, _vary(rng, (48, 38, 42), 6), _vary(rng, (70, 56, 54), 6))
    x, y = rng.uniform(0.35, 0.65), rng.uniform(0.36, 0.46)
    for wide, shade in ((0.46, (82, 68, 64)), (0.36, (120, 104, 96)), (0.27, (190, 200, 205))):
        canvas.ellipse(x, y, wide, wide * 0.85, shade)
    for at in np.arange(rng.uniform(-0.05, 0.05), 1.05, 0.13):
        canvas.polygon([(at - 0.07, 0), (at, rng.uniform(0.12, 0.3)), (at + 0.07, 0)], _vary(rng, (40, 31, 35), 5))
    canvas.hills(rng, rng.uniform(0.7, 0.76), 0.03, _vary(rng, (62, 48, 46), 6))
    return canvas.finish()


def farm(rng: Rng, size: int) -> Image.Image:
    canvas = Canvas(size, _vary(rng, (150, 205, 240)), _vary(rng, (235, 240, 230)), horizon=0.5)
    canvas.hills(rng, 0.5, 0.02, _vary(rng, (190, 195, 90)))
    x, side = rng.uniform(0.02, 0.6), rng.uniform(0.36, 0.42)
    canvas.box(x, 0.26, x + side, 0.58, _vary(rng, (180, 45, 40)))
    canvas.polygon([(x - 0.04, 0.28), (x + side / 2, 0.06), (x + side + 0.04, 0.28)], _vary(rng, (95, 70, 65)))
    canvas.box(x + side * 0.3, 0.38, x + side * 0.7, 0.58, (245, 240, 235))
    canvas.box(x + side * 0.34, 0.41, x + side * 0.66, 0.58, (130, 35, 32))
    canvas.box(0, 0.57, 1, 1, _vary(rng, (215, 185, 90)))
    for y in np.linspace(0.64, 0.94, 4):
        canvas.box(0, y, 1, y + 0.025, _vary(rng, (185, 150, 65)))
    return canvas.finish()


def stage(rng: Rng, size: int) -> Image.Image:
    canvas = Canvas(size, _vary(rng, (60, 10, 25), 6), _vary(rng, (90, 16, 35), 6))
    x = rng.uniform(0.42, 0.58)
    canvas.polygon([(x - 0.06, 0), (x + 0.06, 0), (x + 0.42, 0.8), (x - 0.42, 0.8)], _vary(rng, (225, 190, 140)))
    for left in (0.0, 0.76):
        for number in range(4):
            shade = ((190, 25, 45), (150, 15, 35))[number % 2]
            canvas.box(left + 0.06 * number, 0, left + 0.06 * number + 0.06, 0.78, shade)
    canvas.box(0, 0, 1, 0.09, (200, 30, 50))
    canvas.box(0, 0.76, 1, 1, _vary(rng, (150, 100, 60)))
    canvas.ellipse(x, 0.86, 0.4, 0.08, (225, 185, 120))
    return canvas.finish()


def sky(rng: Rng, size: int) -> Image.Image:
    canvas = Canvas(size, _vary(rng, (70, 150, 240)), _vary(rng, (165, 215, 250)))
    for y in (0.1, 0.36, 0.62, 0.9):
        x = rng.uniform(0, 1)
        for dx, dy, radius in ((-0.13, 0.02, 0.09), (0, 0, 0.12), (0.13, 0.02, 0.09)):
            canvas.ellipse(x + dx, y + dy, radius, radius * 0.62, (250, 252, 255))
    return canvas.finish()


BACKGROUNDS: dict[str, tuple[Callable[[Rng, int], Image.Image], tuple[str, ...]]] = {
    "beach": (beach, ("on the beach", "at the beach")),
    "snow": (snow, ("in the snow",)),
    "meadow": (meadow, ("in a meadow", "on the grass")),
    "desert": (desert, ("in the desert",)),
    "forest": (forest, ("in the forest", "in the woods")),
    "sea": (sea, ("under the sea", "under water")),
    "city": (city, ("in the city", "on the street")),
    "mountains": (mountains, ("in the mountains",)),
    "table": (table, ("on a wooden table", "on a table")),
    "space": (space, ("in space", "among the stars")),
    "night": (night, ("at night",)),
    "sunset": (sunset, ("at sunset",)),
    "garden": (garden, ("in a garden", "in the garden")),
    "kitchen": (kitchen, ("in a kitchen", "in the kitchen")),
    "library": (library, ("in a library",)),
    "road": (road, ("on a road", "on the road")),
    "cave": (cave, ("in a cave",)),
    "farm": (farm, ("on a farm",)),
    "stage": (stage, ("on a stage", "on stage")),
    "sky": (sky, ("in the sky", "among the clouds")),
}
"""Name -> function that paints it, and the phrases that captions use for it."""
