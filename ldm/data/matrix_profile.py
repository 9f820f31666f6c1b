"""ICC profiles of RGB spaces that are given by three primaries, a white and a curve.

Source: ICC.1:2022, sections 7 and 10; the chromatic adaptation is that of its annex E (Bradford).
"""
from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np

D50 = (0.9642, 1.0, 0.8249)  # XYZ of the white of all profiles
BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
D65_POINT = (0.3127, 0.3290)
SRGB_CURVE = (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)  # parameters of function 3
HEADER_SIZE = 128


@dataclass(frozen=True)
class RGBSpace:
    """An RGB space.

    Attributes:
        points: chromaticities x, y of white, red, green and blue: 8 numbers.
        gamma: exponent from numbers to light; None: the curve of sRGB.
    """

    points: tuple[float, ...]
    gamma: float | None = None


SRGB = RGBSpace((*D65_POINT, 0.64, 0.33, 0.30, 0.60, 0.15, 0.06))
DISPLAY_P3 = RGBSpace((*D65_POINT, 0.680, 0.320, 0.265, 0.690, 0.150, 0.060))
BT2020 = RGBSpace((*D65_POINT, 0.708, 0.292, 0.170, 0.797, 0.131, 0.046))
ADOBE_RGB = RGBSpace((*D65_POINT, 0.64, 0.33, 0.21, 0.71, 0.15, 0.06), gamma=563 / 256)


def matrix_profile(space: RGBSpace) -> bytes:
    """Return the ICC profile of an RGB space.

    Raises:
        ValueError, ZeroDivisionError, numpy.linalg.LinAlgError: its numbers describe no space.
    """
    curve = _curve(space.gamma)
    tags = {b"wtpt": _xyz(D50), b"rTRC": curve, b"gTRC": curve, b"bTRC": curve,
            b"desc": b"desc" + bytes(4) + struct.pack(">I", 1) + bytes(79), b"cprt": b"text" + bytes(8)}
    tags |= {name: _xyz(column) for name, column in zip((b"rXYZ", b"gXYZ", b"bXYZ"), _primaries(space).T, strict=True)}

    # A table of names, positions and sizes, and then the tags one after the other.
    table, body = struct.pack(">I", len(tags)), b""
    start = HEADER_SIZE + 4 + 12 * len(tags)
    for name, content in tags.items():
        content += bytes(-len(content) % 4)
        table += name + struct.pack(">II", start + len(body), len(content))
        body += content
    size = HEADER_SIZE + len(table) + len(body)
    header = struct.pack(">I4sI4s4s4s12s4s28s", size, b"", 0x04000000, b"mntr", b"RGB ", b"XYZ ", b"", b"acsp", b"")
    header += struct.pack(">3i", *_fixed(D50))
    return header.ljust(HEADER_SIZE, b"\0") + table + body


def _primaries(space: RGBSpace) -> np.ndarray:
    """Return the matrix (3, 3) from linear RGB to XYZ, adapted to the white of profiles."""
    white, *colors = (np.array((x / y, 1, (1 - x - y) / y))
                      for x, y in zip(space.points[::2], space.points[1::2], strict=True))
    columns = np.stack(colors, axis=1)
    scaled = columns * np.linalg.solve(columns, white)
    adaptation = np.diag((BRADFORD @ np.array(D50)) / (BRADFORD @ white))
    return np.linalg.inv(BRADFORD) @ adaptation @ BRADFORD @ scaled


def _curve(gamma: float | None) -> bytes:
    if gamma is not None and not 0.1 <= gamma <= 10:
        raise ValueError(f"gamma {gamma}")
    function, parameters = (3, SRGB_CURVE) if gamma is None else (0, (gamma,))
    return b"para" + bytes(4) + struct.pack(f">HH{len(parameters)}i", function, 0, *_fixed(parameters))


def _xyz(values: tuple[float, ...] | np.ndarray) -> bytes:
    return b"XYZ " + bytes(4) + struct.pack(">3i", *_fixed(values))


def _fixed(values: tuple[float, ...] | np.ndarray) -> list[int]:
    """Return numbers as s15Fixed16."""
    return [round(float(value) * 65536) for value in values]
