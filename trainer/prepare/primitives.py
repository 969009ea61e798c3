"""Procedural training objects with the shapes of everyday things: packages, vessels, tools, fruit, toys, furniture.

Object ``index`` of ``seed`` is a function of the two alone. It is made of closed parts that may overlap (the solid
rule of triptych/geometry/solid.py floods from outside), turned by any angle about +Y, a quarter of them also tilted,
and coloured by a small atlas of packages' prints, bands, patterns and plain colours.
Vessels fold their profile back inwards, so that they have a wall and stay open at the top.
"""

from __future__ import annotations

import argparse
import multiprocessing
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from triptych.errors import TriptychError
from triptych.geometry.files import write_glb
from triptych.geometry.mesh import Material, Mesh

from .lofts import (
    Generator,
    Outline,
    Part,
    arc_path,
    bent,
    bevelled,
    box,
    box_uv,
    circle,
    ellipsoid,
    line_path,
    loft,
    mirrored,
    polar,
    polygon,
    raised,
    rectangle,
    rotation,
    signed_power,
    smoothed,
    sweep,
    torus,
)  # fmt: skip
from .paints import atlas

_TILTED = 0.25  # of the objects
_CREASE_DEG = 38.0


def primitive(seed: int, index: int) -> tuple[str, Mesh]:
    """The kind and the mesh of one object: model space, closed parts, normals, corner UV, one base colour texture."""
    rng = np.random.default_rng((seed, index))
    kind = _draw_kind(rng)
    return kind, _assembled(_KINDS[kind][1](rng), rng, 360 * rng.random())


def _draw_kind(rng: Generator) -> str:
    weights = np.array([weight for weight, _ in _KINDS.values()])
    return list(_KINDS)[int(rng.choice(len(weights), p=weights / weights.sum()))]


def _package(rng: Generator) -> list[Part]:
    x, y, z = np.exp(rng.normal(0, 0.55, 3))
    least = min(x, y, z)
    rounded = least * (0 if rng.random() < 0.45 else rng.uniform(0.02, 0.45))
    body = box(x, y, z, rounded, rounded if rng.random() < 0.7 else 0.0)
    if rng.random() < 0.25:
        body = bent(body, rng, 0.05)
    if rng.random() < 0.2:
        lid = box(x * 1.04, y * 0.2, z * 1.04, rounded).painted(1).moved(y=y * 0.82)
        return [body, lid]
    return [body]


def _prism(rng: Generator) -> list[Part]:
    width, height = rng.uniform(0.15, 0.6), rng.uniform(0.2, 1.2)
    profile = bevelled(width, height, width * rng.choice([0, rng.uniform(0, 0.3)]))
    profile[len(profile) // 2 :, 0] *= rng.choice([1.0, rng.uniform(0.1, 1.0)])
    return [raised(polygon(int(rng.integers(3, 9))), profile)]


def _extruded(rng: Generator) -> list[Part]:
    """Stars, gears, hearts, letters' cousins: any outline seen whole from its middle."""
    angles = np.arange(72) * (2 * np.pi / 72)
    waves = rng.integers(2, 9)
    radii = 1 + rng.uniform(0.1, 0.4) * np.sin(waves * angles)
    if rng.random() < 0.4:
        radii = np.where(np.sin(waves * angles) > 0, 1.0, rng.uniform(0.6, 0.9))
    if rng.random() < 0.4:
        radii = np.exp(sum(rng.normal(0, 0.25) * np.sin(k * angles + rng.uniform(0, 6.3)) for k in (1, 2, 3)))
    part = raised(polar(radii), bevelled(0.5, rng.uniform(0.08, 0.8), rng.choice([0, 0.03, 0.08])))
    return [part.rotated(rotation(0, 90)) if rng.random() < 0.4 else part]


def _bottle(rng: Generator) -> list[Part]:
    width, height = rng.uniform(0.12, 0.4), 1.0
    neck, shoulder = width * rng.uniform(0.25, 0.8), rng.uniform(0.45, 0.8)
    nodes = np.array([(width * 0.9, 0), (width, 0.03), (width * rng.uniform(0.85, 1), shoulder * 0.6),
                      (width, shoulder),
                      (neck, rng.uniform(shoulder + 0.08, 0.92)), (neck, height)])  # fmt: skip
    outline = circle() if rng.random() < 0.7 else rectangle(width, width * rng.uniform(0.5, 1), width * 0.4)
    body = raised(outline, smoothed(nodes, int(rng.integers(0, 3))))
    parts = [body]
    if rng.random() < 0.7:
        cap = raised(circle(28), bevelled(neck * rng.uniform(1.0, 1.4), rng.uniform(0.05, 0.18), 0.01)).painted(1)
        parts.append(cap.moved(y=height - 0.02))
    if rng.random() < 0.2:  # a spray head or a pump
        parts.append(box(0.09, 0.09, neck + 0.25, 0.03, 0.02).painted(1).moved(y=height + 0.05, z=0.08))
    if rng.random() < 0.15:
        handle = arc_path(width * 0.6, 0.2, -80, 80)
        parts.append(sweep(handle, 0.04).painted(1).moved(x=width * 0.9, y=shoulder * 0.6))
    return parts


def _can(rng: Generator) -> list[Part]:
    width, height = rng.uniform(0.25, 0.5), rng.uniform(0.15, 1.4)
    profile = bevelled(width, height, width * rng.choice([0.0, 0.05, 0.15]))
    if rng.random() < 0.3:  # a rim stands around a sunken lid
        profile = np.array([(width, 0), (width, height), (width * 0.94, height), (width * 0.92, height - 0.04)])
    return [raised(circle(), profile)]


def _vase(rng: Generator) -> list[Part]:
    count = int(rng.integers(4, 8))
    nodes = np.stack([rng.uniform(0.08, 0.42, count), np.linspace(0, 1, count)], axis=1)
    return [raised(circle(36), smoothed(nodes, int(rng.integers(0, 3))))]


def _vessel(outline: Outline, outer: np.ndarray, wall: float, floor: float) -> Part:
    """An outer profile, from the bottom up, folded back inwards at the rim down to the floor; open at the top."""
    top = outer[-1, 1]
    heights = np.linspace(top, min(floor, top * 0.7), 12)
    inner = np.stack([np.maximum(np.interp(heights, outer[:, 1], outer[:, 0]) - wall, 0.01), heights], axis=1)
    return raised(outline, np.concatenate([outer, inner]), inner_from=len(outer))


def _cup(rng: Generator) -> list[Part]:
    width, height = rng.uniform(0.28, 0.5), rng.uniform(0.5, 1.2)
    foot = width * rng.uniform(0.6, 1.05)
    nodes = np.array([(foot, 0), ((foot + width) / 2 * rng.uniform(0.9, 1.12), height / 2), (width, height)])
    square = rng.random() < 0.2
    outline = rectangle(width, width * rng.uniform(0.8, 1), width * rng.uniform(0, 0.6)) if square else circle()
    wall = rng.uniform(0.025, 0.07)
    parts = [_vessel(outline, smoothed(nodes, int(rng.integers(0, 3))), wall, rng.uniform(0.03, 0.12))]
    if rng.random() < 0.55:
        middle, reach = height * rng.uniform(0.45, 0.6), height * rng.uniform(0.2, 0.32)
        arc = arc_path(rng.uniform(0.15, 0.3), reach, -90, 90)
        radii = (rng.uniform(0.025, 0.05), rng.uniform(0.03, 0.07))
        side = np.interp([middle - reach, middle + reach], nodes[:, 1], nodes[:, 0]).min()
        handle = sweep(arc, np.array([radii] * len(arc)), round_ends=False)
        parts.append(handle.painted(int(rng.choice([0, 2]))).moved(x=side - wall * 0.8, y=middle))
    return parts


def _bowl(rng: Generator) -> list[Part]:
    width, height = 0.5, rng.uniform(0.15, 0.5)
    power = rng.uniform(0.3, 0.9)
    heights = np.linspace(0, 1, 10)
    foot = rng.uniform(0.15, 0.3)
    outer = np.stack([foot + (width - foot) * heights**power, heights * height], axis=1)
    outline = circle(48) if rng.random() < 0.8 else polar(1 + 0.06 * np.sin(8 * np.linspace(0, 2 * np.pi, 48, False)))
    return [_vessel(outline, outer, rng.uniform(0.02, 0.05), rng.uniform(0.03, 0.08))]


def _plate(rng: Generator) -> list[Part]:
    height = rng.uniform(0.05, 0.14)
    foot = rng.uniform(0.22, 0.35)
    outer = np.array([(foot, 0), (foot + 0.03, 0.01), (0.5, height)])
    outline = circle(48) if rng.random() < 0.8 else rectangle(0.5, rng.uniform(0.35, 0.5), 0.2)
    return [_vessel(outline, outer, rng.uniform(0.02, 0.06), rng.uniform(0.02, 0.04))]


def _pan(rng: Generator) -> list[Part]:
    width, height = 0.35, rng.uniform(0.07, 0.45)
    foot = width * rng.uniform(0.75, 1)
    wall = rng.uniform(0.02, 0.04)
    parts = [_vessel(circle(44), np.array([(foot, 0), (width, height)]), wall, rng.uniform(0.02, 0.04))]
    thick = np.array([[rng.uniform(0.015, 0.03), rng.uniform(0.02, 0.05)]])
    if rng.random() < 0.65:
        length, lift = rng.uniform(0.3, 0.6), rng.uniform(-0.02, 0.12)
        path = line_path((width - wall / 2, height * 0.75, 0), (width + length, height * 0.75 + lift, 0))
        parts.append(sweep(path, thick.repeat(len(path), 0)).painted(2))
    else:
        for turn in (0, 180):
            arc = arc_path(0.1, 0.13, -90, 90)[:, [0, 2, 1]] + (width - wall, height * 0.8, 0)
            parts.append(sweep(arc, 0.025).painted(2).rotated(rotation(1, turn)))
    if rng.random() < 0.2:
        parts.append(ellipsoid(width, 0.08, width).moved(y=height).painted(3))
        parts.append(ellipsoid(0.05, 0.05, 0.05, rings=8).moved(y=height + 0.1).painted(2))
    return parts


def _tray(rng: Generator) -> list[Part]:
    a, b = rng.uniform(0.2, 0.5), rng.uniform(0.2, 0.5)
    width, height = min(a, b), rng.uniform(0.1, 0.7)
    outer = np.array([(width * rng.uniform(0.8, 1), 0), (width, height)])
    return [
        _vessel(rectangle(a, b, width * rng.uniform(0, 0.6)), outer, rng.uniform(0.02, 0.06), rng.uniform(0.02, 0.08))
    ]


def _ball(rng: Generator) -> list[Part]:
    if rng.random() < 0.4:
        return [ellipsoid(0.5, 0.5, 0.5)]
    x, y, z = np.exp(rng.normal(0, 0.4, 3))
    return [ellipsoid(x, y, z, power=rng.uniform(0.25, 1.3), across=rng.uniform(0.25, 1.3), rings=18)]


def _fruit(rng: Generator) -> list[Part]:
    form = rng.random()
    if form < 0.25:  # a banana
        turn = rng.uniform(60, 150)
        path = arc_path(0.5, 0.5, -turn / 2, turn / 2, 20)[:, [0, 2, 1]]
        along = np.linspace(-1, 1, len(path))
        radii = rng.uniform(0.07, 0.11) * np.sqrt(np.clip(1.03 - along**4, 0.05, 1))
        return [bent(sweep(path, radii), rng, 0.01)]
    if form < 0.4:  # a pear
        nodes = np.array([(0.1, 0), (0.36, 0.1), (0.4, 0.4), (0.2, 0.75), (rng.uniform(0.08, 0.2), 1), (0.03, 1.03)])
        return [
            bent(raised(circle(32), smoothed(nodes)), rng, 0.05),
            sweep(line_path((0, 1, 0), (0.03, 1.15, 0)), 0.02).painted(1),
        ]
    body = bent(
        ellipsoid(0.5, rng.uniform(0.35, 0.7), rng.uniform(0.4, 0.55), rng.uniform(0.8, 1.1)),
        rng,
        rng.uniform(0.03, 0.16),
    )
    if rng.random() < 0.5:
        return [body]
    top = body.vertices[:, 1].max()
    return [body, sweep(line_path((0, top - 0.06, 0), (rng.uniform(-0.1, 0.1), top + 0.1, 0)), 0.02).painted(1)]


def _tube(rng: Generator) -> list[Part]:
    nodes = np.cumsum(rng.normal(0, (0.5, 0.15, 0.5), (int(rng.integers(2, 6)), 3)), axis=0)
    path = line_path(*map(tuple, nodes), smooth=3)
    size = np.ptp(path, axis=0).max()
    taper = np.linspace(1, rng.uniform(0.4, 1), len(path))
    flat = np.array([1.0, rng.choice([1.0, rng.uniform(0.4, 1)])])
    section = circle(16)(1.0) if rng.random() < 0.7 else rectangle(1, 1, 0.2)(1.0)
    return [sweep(path, size * rng.uniform(0.025, 0.1) * taper[:, None] * flat, section, round_ends=rng.random() < 0.7)]


def _tool(rng: Generator) -> list[Part]:
    """Lying flat, along x."""
    form, length, thick = int(rng.integers(0, 6)), rng.uniform(0.45, 0.7), rng.uniform(0.025, 0.05)
    path = line_path((0, 0, 0), (length, 0, 0))
    swell = thick * (1 + rng.uniform(0, 0.5) * np.sin(np.linspace(0, np.pi * rng.uniform(1, 3), len(path))))
    grip = sweep(path, np.stack([swell, swell * rng.uniform(0.6, 1)], axis=1))
    if form == 0:  # a hammer
        across = line_path((length, 0, -rng.uniform(0.1, 0.2)), (length, 0, rng.uniform(0.1, 0.25)))
        head = sweep(across, rng.uniform(0.04, 0.08),
                      rectangle(1, 1, rng.uniform(0, 1))(1.0), round_ends=False)  # fmt: skip
        return [grip, head.painted(1)]
    if form == 1:  # a screwdriver
        thick = rng.uniform(0.05, 0.08)
        grip = sweep(
            line_path((0, 0, 0), (0.35, 0, 0)),
            thick,
            polar(1 + 0.1 * np.sin(6 * np.linspace(0, 6.283, 24, False)))(1.0),
        )
        return [grip, sweep(line_path((0.3, 0, 0), (0.35 + length, 0, 0)), rng.uniform(0.018, 0.03)).painted(1)]
    if form == 2:  # a spoon, a spatula
        wide, long = rng.uniform(0.06, 0.13), rng.uniform(0.1, 0.2)
        head = ellipsoid(long, rng.uniform(0.02, 0.04), wide, 1.0, rng.uniform(0.4, 1))
        return [grip, head.moved(x=length + long * 0.8).painted(1)]
    if form == 3:  # pliers, scissors: two bent bars, crossed
        nodes = [(-0.5, 0, rng.uniform(0.06, 0.16)), (-0.15, 0, 0.07), (0, 0, 0), (0.15, 0, -0.04), (0.42, 0, -0.01)]
        bar = sweep(
            line_path(*nodes, smooth=2), np.array([[thick * 0.8, thick]]).repeat(len(line_path(*nodes, smooth=2)), 0)
        )
        pin = raised(circle(20), bevelled(0.06, 0.07, 0.01)).moved(y=-0.035)
        return [bar, mirrored(bar), pin.painted(1)]
    if form == 4:  # a clamp: a jaw around an opening, and a screw
        size = rng.uniform(0.2, 0.35)
        jaw = line_path((0, 0, size), (size, 0, size), (size, 0, -size), (0, 0, -size))
        screw = sweep(line_path((0, 0, -size - 0.35), (0, 0, size * 0.3)), 0.028).painted(1)
        bar = sweep(line_path((-0.12, 0, -size - 0.33), (0.12, 0, -size - 0.33)), 0.02).painted(1)
        return [sweep(jaw, thick * 1.2, rectangle(1, 1)(1.0)), screw, bar]
    head = torus(0.09, np.array([0.035, 0.03]), rectangle(1, 1, 0.3)(1.0))  # a wrench, a magnifying glass
    return [grip, head.scaled(rng.uniform(0.8, 1.8), 1, rng.uniform(0.8, 1.8)).moved(x=length + 0.08).painted(1)]


def _block(rng: Generator) -> list[Part]:
    """The wooden ones: wedges, half cylinders, arches."""
    form, depth = int(rng.integers(0, 3)), rng.uniform(0.2, 0.8)
    if form == 0:
        nodes = np.array([(-0.5, 0), (0.5, 0), (rng.uniform(-0.5, 0.5), rng.uniform(0.3, 1))])
        section = np.concatenate(
            [
                a + (b - a) * np.linspace(0, 1, 8, False)[:, None]
                for a, b in zip(nodes, np.roll(nodes, -1, 0), strict=True)
            ]
        )
    elif form == 1:
        section = np.concatenate(
            [
                arc_path(0.5, rng.uniform(0.3, 0.7), 0, 180, 24)[:, :2],
                np.stack([np.linspace(-0.45, 0.45, 10), np.zeros(10)], 1),
            ]
        )
    else:
        path, thick = arc_path(0.4, rng.uniform(0.35, 0.6), 0, 180, 24), rng.uniform(0.08, 0.2)
        return [sweep(path, np.array([[thick / 2, depth / 2]]).repeat(24, 0), rectangle(1, 1)(1.0), False)]
    steps = np.linspace(-depth / 2, depth / 2, 6)
    return [box_uv(loft(np.stack([np.insert(section, 2, z, axis=1) for z in steps])))]


def _brick(rng: Generator) -> list[Part]:
    columns, rows, height = int(rng.integers(1, 7)), int(rng.integers(1, 4)), rng.choice([0.4, 0.9, 1.2])
    shell = _vessel(
        rectangle(columns / 2, rows / 2),
        np.array([(min(columns, rows) / 2, 0), (min(columns, rows) / 2, height)]),
        0.15,
        0.2,
    )
    parts = [shell.painted(0).scaled(1, -1, 1)]
    parts = [replace(part, faces=part.faces[:, ::-1], uv=part.uv[:, ::-1]).moved(y=height) for part in parts]
    stud = raised(circle(16), np.array([(0.3, 0), (0.3, 0.22), (0.27, 0.25)]), 0.3)
    return parts + [
        stud.moved(i + 0.5 - columns / 2, height - 0.02, j + 0.5 - rows / 2)
        for i in range(columns)
        for j in range(rows)
    ]


def _vehicle(rng: Generator) -> list[Part]:
    length, width, height = 1.0, rng.uniform(0.35, 0.55), rng.uniform(0.15, 0.35)
    wheel, track = rng.uniform(0.08, 0.17), width / 2
    parts = [box(width, height, length, 0.06 * rng.random(), 0.06 * rng.random()).moved(y=wheel * 0.8)]
    cabin = box(width * 0.9, rng.uniform(0.12, 0.3), length * rng.uniform(0.25, 0.6), 0.05, 0.05 * rng.random())
    parts.append(cabin.moved(y=wheel * 0.8 + height - 0.02, z=rng.uniform(-0.2, 0.2)).painted(1))
    if rng.random() < 0.3:
        tank = (
            raised(circle(28), bevelled(width * 0.4, 0.45, 0.05))
            .rotated(rotation(0, 90))
            .moved(y=wheel + height + width * 0.3, z=-0.45)
        )
        parts.append(tank.painted(3))
    tyre = raised(circle(24), bevelled(wheel, rng.uniform(0.06, 0.12), 0.02)).rotated(rotation(2, 90)).painted(2)
    for z in np.linspace(-0.32, 0.32, int(rng.choice([2, 2, 3]))):
        parts += [tyre.moved(track + 0.08, wheel, z), tyre.moved(-track + 0.02, wheel, z)]
    return parts


def _figure(rng: Generator) -> list[Part]:
    """A standing doll or a plush animal on all fours, facing +z."""
    fat, head = rng.uniform(0.14, 0.24), rng.uniform(0.12, 0.24)
    limb = rng.uniform(0.04, 0.09)
    if rng.random() < 0.5:
        parts = [ellipsoid(fat, 0.25, fat * rng.uniform(0.7, 1), rng.uniform(0.5, 1)).moved(y=0.5)]
        parts.append(ellipsoid(head, head * rng.uniform(0.9, 1.2), head).moved(y=0.72 + head).painted(1))
        for side in (-1, 1):
            hand = (side * (fat + rng.uniform(0.05, 0.3)), rng.uniform(0.3, 0.9), rng.uniform(-0.05, 0.25))
            parts.append(
                sweep(line_path((side * fat * 0.7, 0.62, 0), hand), limb * 0.9).painted(int(rng.choice([0, 1])))
            )
            parts.append(
                sweep(
                    line_path((side * fat * 0.5, 0.35, 0), (side * fat * 0.6, limb, rng.uniform(0, 0.1))), limb
                ).painted(2)
            )
            if rng.random() < 0.4:
                parts.append(
                    ellipsoid(head * 0.35, head * 0.5, head * 0.2, rings=8)
                    .moved(side * head * 0.7, 0.72 + head * 1.9)
                    .painted(1)
                )
        return parts
    length, high = rng.uniform(0.3, 0.5), rng.uniform(0.2, 0.45)
    parts = [ellipsoid(fat, fat * rng.uniform(0.8, 1.1), length).moved(y=high + fat * 0.5)]
    parts.append(
        ellipsoid(head, head, head * rng.uniform(0.9, 1.4))
        .moved(y=high + fat + rng.uniform(0, 0.25), z=length)
        .painted(int(rng.choice([0, 1])))
    )
    parts += [
        sweep(
            line_path((x * fat * 0.6, high, z * length * 0.6), (x * fat * 0.7, limb, z * length * 0.65)), limb
        ).painted(2)
        for x in (-1, 1)
        for z in (-1, 1)
    ]
    tail = line_path((0, high + fat * 0.6, -length * 0.9), (0, high + fat * rng.uniform(0, 2), -length - 0.2))
    return [*parts, sweep(tail, limb * 0.6).painted(0)]


def _shoe(rng: Generator) -> list[Part]:
    """A sole and an upper whose opening is at the ankle; heel at -z."""
    angles = np.arange(44) * (2 * np.pi / 44)
    waist = 1 - rng.uniform(0.1, 0.3) * np.exp(-((np.cos(angles) + 0.1) ** 2) / 0.08)
    foot = np.stack([0.18 * signed_power(np.sin(angles), 0.8) * waist, 0.5 * signed_power(np.cos(angles), 0.9)], axis=1)
    high, toe, ankle, wall = (
        rng.uniform(0.22, 0.6),
        rng.uniform(0.08, 0.16),
        rng.uniform(0.15, 0.35),
        rng.uniform(0.02, 0.035),
    )

    def ring(t: float, inset: float) -> np.ndarray:
        back, front = -0.5, 0.5 - (1 - ankle - 0.1) * np.clip((t - toe / high) / (1 - toe / high), 0, 1) ** rng_power
        z = (foot[:, 1] + 0.5) * (front - back) + back
        flat = np.stack([foot[:, 0] * (1 - 0.25 * t), z], axis=1)
        middle = flat.mean(axis=0)
        extent = np.abs(flat - middle).max(axis=0)
        return np.insert(middle + (flat - middle) * (1 - inset / extent), 1, t * high, axis=1)

    rng_power = rng.uniform(0.4, 0.9)
    outer = [ring(t, 0) for t in np.linspace(0, 1, 12)]
    inner = [ring(t, wall) for t in np.linspace(1, 0.15, 10)]
    upper = loft(np.stack(outer + inner), np.array([0] * 12 + [1] * 9))
    sole = raised(lambda r: foot * (1.06 * r / 0.5), bevelled(0.5, rng.uniform(0.03, 0.09), 0.01)).painted(2)
    return [upper, sole.moved(y=-0.03)]


def _table(rng: Generator) -> list[Part]:
    x, z, high, thick = rng.uniform(0.4, 1), rng.uniform(0.3, 0.8), rng.uniform(0.3, 0.9), rng.uniform(0.03, 0.1)
    round_top = rng.random() < 0.25
    top = (
        raised(circle(44), bevelled(min(x, z) / 2, thick, 0.01))
        if round_top
        else box(x, thick, z, 0.05 * rng.random(), 0.01)
    )
    side = min(x, z) * 0.7 if round_top else None
    reach_x, reach_z, leg = (side or x) / 2 - 0.05, (side or z) / 2 - 0.05, rng.uniform(0.025, 0.05)
    section = circle(14)(1.0) if rng.random() < 0.5 else rectangle(1, 1)(1.0)
    splay = rng.choice([1.0, rng.uniform(0.8, 1.2)])
    foot_x, foot_z = reach_x * splay, reach_z * splay
    legs = [sweep(line_path((a * foot_x, 0, b * foot_z), (a * reach_x, high + 0.01, b * reach_z)), leg, section, False)
            for a in (-1, 1) for b in (-1, 1)]  # fmt: skip
    parts = [top.moved(y=high), *[part.painted(1) for part in legs]]
    if rng.random() < 0.5:  # a chair
        parts.append(
            box(x, rng.uniform(0.3, 0.8), 0.05, 0, 0.01)
            .moved(y=high, z=-z / 2 + 0.025)
            .painted(int(rng.choice([0, 1])))
        )
    return parts


def _shelf(rng: Generator) -> list[Part]:
    x, y, z, thick = rng.uniform(0.4, 1), rng.uniform(0.5, 1.2), rng.uniform(0.2, 0.5), rng.uniform(0.03, 0.06)
    boards = [box(x, thick, z).moved(y=h) for h in np.linspace(0, y - thick, int(rng.integers(2, 6)))]
    walls = [box(thick, y, z).moved(x=s * (x - thick) / 2).painted(1) for s in (-1, 1)]
    back = [box(x, y, thick).moved(z=-(z - thick) / 2).painted(1)] if rng.random() < 0.6 else []
    return [*boards, *walls, *back]


def _ring(rng: Generator) -> list[Part]:
    section = circle(20)(1.0) if rng.random() < 0.6 else rectangle(1, 1, rng.uniform(0, 0.5))(1.0)
    part = torus(0.38, rng.uniform(0.04, 0.14, 2), section, 48).scaled(1, 1, rng.uniform(0.7, 1))
    return [part.rotated(rotation(0, 90)) if rng.random() < 0.3 else part]


_SIMPLE = (_package, _prism, _can, _vase, _ball, _tube, _block, _ring, _extruded, _bottle, _cup, _fruit)


def _union(rng: Generator) -> list[Part]:
    """Two to five simple things, each set on a spot of what is there."""
    parts: list[Part] = []
    for number in range(int(rng.integers(2, 6))):
        chosen = _SIMPLE[int(rng.integers(len(_SIMPLE)))](rng)
        points = np.concatenate([part.vertices for part in chosen])
        scale = rng.uniform(0.35, 1.0) / np.ptp(points, axis=0).max()
        turn = rotation(int(rng.integers(3)), rng.choice([0.0, 90.0, rng.uniform(0, 360)]))
        spot = np.zeros(3)
        if parts:
            spot = parts[int(rng.integers(len(parts)))].vertices
            spot = spot[int(rng.integers(len(spot)))]
        for part in chosen:
            centred = replace(part, vertices=(part.vertices - points.mean(axis=0)) * scale)
            parts.append(centred.rotated(turn).moved(*spot).painted((int(part.paint[0]) + number) % 6))
    return parts


_KINDS: dict[str, tuple[float, Callable[[Generator], list[Part]]]] = {
    "package": (14, _package), "prism": (4, _prism), "extruded": (3, _extruded), "bottle": (8, _bottle),
    "can": (6, _can), "vase": (3, _vase), "cup": (9, _cup), "bowl": (5, _bowl), "plate": (3, _plate),
    "pan": (4, _pan), "tray": (4, _tray), "ball": (4, _ball), "fruit": (6, _fruit), "tube": (3, _tube),
    "tool": (9, _tool), "block": (4, _block), "brick": (3, _brick), "vehicle": (4, _vehicle), "figure": (5, _figure),
    "shoe": (5, _shoe), "table": (3, _table), "shelf": (2, _shelf), "ring": (2, _ring), "union": (7, _union),
}  # fmt: skip


def _assembled(parts: list[Part], rng: Generator, yaw_deg: float) -> Mesh:
    offsets = np.cumsum([0] + [len(part.vertices) for part in parts[:-1]])
    vertices = np.concatenate([part.vertices for part in parts])
    faces = np.concatenate([part.faces + offset for part, offset in zip(parts, offsets, strict=True)])
    uv, paint = np.concatenate([part.uv for part in parts]), np.concatenate([part.paint for part in parts])
    if rng.random() < _TILTED:
        lying = rng.random() < 0.5
        axis = rng.integers(0, 2) * 2
        vertices = vertices @ rotation(int(axis), 90.0 if lying else rng.uniform(-60, 60)).T
    mesh = Mesh((vertices @ rotation(1, yaw_deg).T).astype(np.float32), faces).normalized()
    used, paint = np.unique(paint, return_inverse=True)
    grid = int(np.ceil(np.sqrt(len(used))))
    place = np.stack([paint % grid, paint // grid], axis=1)[:, None]
    uv = ((np.clip(uv, 0, 1) * 0.96 + 0.02 + place) / grid).astype(np.float32)
    picture = atlas(rng, len(used), grid)
    return _split(mesh, _creased(mesh), uv).replace(materials=(Material("paint", base_color_texture=picture),))


def _creased(mesh: Mesh) -> np.ndarray:
    """(F, 3, 3) corner normals: the mean over the faces around a vertex that turn away by less than the crease."""
    a, b, c = (mesh.vertices[mesh.faces[:, corner]].astype(np.float64) for corner in range(3))
    area = np.cross(b - a, c - a)
    flat = area / np.maximum(np.linalg.norm(area, axis=1, keepdims=True), 1e-20)
    corner_vertex = mesh.faces.ravel()
    order = np.argsort(corner_vertex, kind="stable")
    valence = np.bincount(corner_vertex, minlength=len(mesh.vertices))
    starts = np.cumsum(valence) - valence
    pairs = valence[corner_vertex]
    one = np.repeat(np.arange(len(corner_vertex)), pairs)
    step = np.arange(len(one)) - np.repeat(np.cumsum(pairs) - pairs, pairs)
    other = order[starts[corner_vertex[one]] + step]
    near = np.einsum("ij,ij->i", flat[one // 3], flat[other // 3]) > np.cos(np.radians(_CREASE_DEG))
    one, other = one[near], other[near]
    total = np.stack([np.bincount(one, area[other // 3, k], len(corner_vertex)) for k in range(3)], axis=1)
    length = np.linalg.norm(total, axis=1, keepdims=True)
    normals = np.where(length > 1e-15, total / np.maximum(length, 1e-15), [0.0, 1.0, 0.0])
    return normals.reshape(-1, 3, 3).astype(np.float32)


def _split(mesh: Mesh, normals: np.ndarray, uv: np.ndarray) -> Mesh:
    """One vertex for every combination of place, normal and UV that corners have."""
    rows = [mesh.faces.reshape(-1, 1), np.rint(normals.reshape(-1, 3) * 500), np.rint(uv.reshape(-1, 2) * 8192)]
    keys = np.concatenate(rows, axis=1).astype(np.int64) + 1000
    packed = keys[:, 0] << 30 ^ keys[:, 1] * 1_000_003 ^ keys[:, 2] * 7_919_111 ^ keys[:, 3] * 104_729_333
    packed = packed * 1_000_033 + keys[:, 4] * 16_411 + keys[:, 5]
    _, first, inverse = np.unique(packed, return_index=True, return_inverse=True)
    return Mesh(
        vertices=mesh.vertices[mesh.faces.ravel()[first]],
        faces=inverse.reshape(-1, 3).astype(np.int64),
        normals=normals.reshape(-1, 3)[first],
        uv=uv.reshape(-1, 2)[first],
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--count", type=int, required=True, metavar="N", help="how many objects")
    parser.add_argument("--seed", type=int, default=0, help="another seed gives other objects (default: 0)")
    parser.add_argument("--out", type=Path, required=True, help="folder for the GLB files, one folder a kind")
    parser.add_argument("--workers", type=int, default=1, help="processes (default: 1)")


def main(args: argparse.Namespace) -> int:
    made = write_primitives(args.out, args.count, args.seed, args.workers)
    print(f"{made} objects written to {args.out}, {args.count - made} were there")
    return 0


def write_primitives(out: Path, count: int, seed: int = 0, workers: int = 1) -> int:
    """Writes objects 0 to count - 1 of a seed as ``out/KIND/SEED_INDEX.glb``; those that are there stay.

    Returns how many were written. Raises TriptychError: a negative number, a folder that cannot be written.
    """
    for name, value, least in (("--count", count, 1), ("--seed", seed, 0), ("--workers", workers, 1)):
        if value < least:
            raise TriptychError(f"{name} must be {least} or more, got {value}")
    missing = [index for index in range(count) if not _path(out, seed, index).exists()]
    write = partial(_write, out, seed)
    progress = partial(tqdm, total=len(missing), unit="object", desc="primitives")
    if workers == 1:
        for index in progress(missing):
            write(index)
        return len(missing)
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        for _ in progress(pool.imap_unordered(write, missing, chunksize=8)):
            pass
    return len(missing)


def _path(out: Path, seed: int, index: int) -> Path:
    return out / _draw_kind(np.random.default_rng((seed, index))) / f"{seed}_{index:06d}.glb"


def _write(out: Path, seed: int, index: int) -> None:
    write_glb(primitive(seed, index)[1], _path(out, seed, index))
