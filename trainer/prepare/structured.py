"""Arrays of the second stage: what lies at and around the surface of every prepared solid.

The solid is the one of the first stage (geometry/solid.py): its labels lie on the 128^3 lattice already, its kept
samples are the part of the mesh that is visible from outside. So distances, colours and normals of the second stage
belong to the same surface, and inner walls are in none of them. Sheets are thinner here, as the lattice is finer.

One ragged safetensors file a shard, in ``structured/`` of the prepared folder:

| array | shape | meaning |
|---|---|---|
| rows | (S,) int32 | row of each sample in the prepared shard |
| voxel_ends, vertex_ends | (S,) int64 | where each sample's voxels and lattice vertices end |
| coords | (N, 3) uint8 | voxels of the 64^3 grid with abs(sdf) < 1.75, lexicographic |
| sdf | (N,) int8 | the prepared distance there, 127 = the prepared band |
| attributes | (N, 10) uint8 | colour, normal, offset, coverage: see ``decode_attributes`` of trainer/structured.py |
| fine_sdf | (M,) int8 | distance at the lattice vertices of the voxels' 2^3 fine cubes, 127 = 4 fine voxels |
| points | (S, 4096, 3) int16 | surface points, 32767 = 0.5 |
| point_normals | (S, 4096, 3) int8 | outwards, 127 = 1 |
| point_colors | (S, 4096, 3) uint8 | sRGB |

Lattice vertex i lies at i / 128 - 0.5; the vertices are those that ``lattice_mask`` marks, in lexicographic order.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import save_file
from tqdm import tqdm

from triptych.errors import TriptychError
from triptych.geometry import solid
from triptych.geometry.files import read_mesh
from triptych.geometry.mesh import Mesh
from triptych.geometry.metrics import sample_surface
from triptych.pipelines.structured import FINE_BAND
from triptych.render import views

from .build import _UNFORESEEN, fingerprint, framed, turned
from .run import _alone, _cores
from .shards import _is_whole, _write, remove_leftovers, write_json
from .sources import OUR_FRAME, Source, find_sources

Job = TypeVar("Job")

FORMAT = 1
FOLDER = "structured"
BAND = 1.75  # voxels: the widest active set that training draws
OFFSET_LIMIT = 2.0  # voxels
POINTS = 4096
_SHEET_HALF = 0.55  # fine voxels, as geometry/solid.py has it in voxels
_FULL_COVERAGE = 6.0  # samples, one a fine cell, that a plane through a voxel leaves in it
_PER_SAMPLE = ("points", "point_normals", "point_colors")


@dataclass(frozen=True)
class Surface:
    """Samples of the solid's surface, one a fine cell.

    points (N, 3) float32, normals (N, 3) float32 outwards (either way on a sheet), wall (N,) bool (else a sheet),
    colors (N, 3) uint8 sRGB, cells (N,) int64 flat fine cell; labels: the lattice's, with a margin of one.
    """

    points: np.ndarray
    normals: np.ndarray
    wall: np.ndarray
    colors: np.ndarray
    cells: np.ndarray
    labels: np.ndarray
    floor: int  # the last samples, which close an open bottom and lie on no face


def lattice_mask(coords: np.ndarray, resolution: int) -> np.ndarray:
    """(2 R + 1,) * 3 bool: vertices of the 2^3 fine cubes of the voxels ``coords`` (N, 3) of an R^3 grid."""
    mask = np.zeros((2 * resolution + 1,) * 3, dtype=bool)
    x, y, z = 2 * coords.astype(np.int64).T
    for dx in range(3):
        for dy in range(3):
            for dz in range(3):
                mask[x + dx, y + dy, z + dz] = True
    return mask


def surface_of(mesh: Mesh, resolution: int) -> Surface:
    """The solid's surface; mesh: in model space. Raises TriptychError as ``solid_sdf`` does."""
    fine = 2 * resolution
    points, face = solid.cover_surface(mesh, spacing=0.5 / fine)
    cells = np.rint((points + 0.5) * fine).astype(np.int64).clip(0, fine)
    flat = np.ravel_multi_index(tuple(cells.T), (fine + 1,) * 3)
    flat, one_each = np.unique(flat, return_index=True)
    points, face, cells = points[one_each], face[one_each], cells[one_each]
    labels = solid._labels(cells, fine + 1)
    normals = mesh.face_normals()[face]
    plus, minus = solid._sides(points, normals, labels, fine)
    inside = solid._INSIDE
    normals = np.where(((plus == inside) & (minus != inside))[:, None], -normals, normals)
    wall = (plus == inside) != (minus == inside)
    kept = wall | (plus != inside)
    labels[tuple(cells[~kept].T + 1)] = inside
    points, normals, wall, flat = points[kept], normals[kept], wall[kept], flat[kept]
    colors = colors_at(mesh, points, face[kept])
    floor = solid._filled_floor(labels, fine)
    if len(floor) and len(points):
        from scipy.spatial import cKDTree

        colors = np.concatenate([colors, colors[cKDTree(points).query(floor)[1]]])
        floor_cells = np.rint((floor + 0.5) * fine).astype(np.int64)
        flat = np.concatenate([flat, np.ravel_multi_index(tuple(floor_cells.T), (fine + 1,) * 3)])
        points = np.concatenate([points, floor])
        down = np.array([0, -1, 0], dtype=np.float32)
        normals = np.concatenate([normals, np.broadcast_to(down, floor.shape)])
        wall = np.concatenate([wall, np.ones(len(floor), dtype=bool)])
    if not len(points):
        raise TriptychError("the solid has no surface that can be seen from outside")
    return Surface(points, normals.astype(np.float32), wall, colors, flat, labels, len(floor))


def colors_at(mesh: Mesh, points: np.ndarray, face: np.ndarray) -> np.ndarray:
    """(N, 3) uint8 sRGB base colour at ``points`` (N, 3), which lie on the faces ``face`` (N,)."""
    a, b, c = (mesh.vertices[mesh.faces[face, k]].astype(np.float64) for k in range(3))
    ab, ac, ap = b - a, c - a, points - a
    bb, bc, cc = (ab * ab).sum(1), (ab * ac).sum(1), (ac * ac).sum(1)
    pb, pc = (ap * ab).sum(1), (ap * ac).sum(1)
    scale = bb * cc - bc * bc
    scale = np.where(scale > 0, scale, np.inf)
    second, third = (cc * pb - bc * pc) / scale, (bb * pc - bc * pb) / scale
    weights = np.stack([1 - second - third, second, third], axis=1).clip(0, 1).astype(np.float32)
    surface = views._Surface(mesh, torch.device("cpu"), "face")
    with torch.inference_mode():
        albedo = surface.albedo(torch.from_numpy(face.astype(np.int64)), torch.from_numpy(weights))
    return (albedo.clamp(0, 1) * 255 + 0.5).to(torch.uint8).numpy()


def lattice_distance(surface: Surface, resolution: int) -> tuple[np.ndarray, np.ndarray]:
    """Signed distance in fine voxels at the (2 R + 1)^3 lattice, clipped to +-FINE_BAND, and the nearest sample or -1.

    Within two fine voxels it is measured to every sample, beyond to one sample of each voxel. At sharp edges, where a
    cell keeps a sample of one face only, that is up to half a fine voxel off near the surface, up to 1.5 beyond.
    """
    fine = 2 * resolution
    # _nearest measures at the centres of a cube of voxels: scaled so that these are the lattice's vertices.
    size = fine + 2
    scaled = ((surface.points + 0.5) * fine + 0.5) / size - 0.5
    distance, nearest = solid._nearest(scaled, surface.normals, size, 2.0)
    voxels = ((surface.points + 0.5) * resolution).astype(np.int64)
    _, few = np.unique(np.ravel_multi_index(tuple(voxels.T), (resolution + 1,) * 3), return_index=True)
    distant, nearest_few = solid._nearest(scaled[few], surface.normals[few], size, FINE_BAND)
    here = (slice(0, fine + 1),) * 3
    nearest, nearest_few = nearest[here], nearest_few[here]
    found = nearest >= 0
    distance = np.where(found, distance[here], distant[here])
    nearest = np.where(found, nearest, np.where(nearest_few >= 0, few[nearest_few], -1))

    label = surface.labels[1:-1, 1:-1, 1:-1]
    signed = np.where(label == solid._INSIDE, -distance, distance)
    near = np.nonzero((nearest >= 0) & (label != solid._INSIDE))
    sample = nearest[near]
    gap = np.stack(near, axis=1).astype(np.float32) - (surface.points[sample] + 0.5) * fine
    side = (gap * surface.normals[sample]).sum(axis=1)
    d = distance[near]
    at_wall = np.where((label[near] == solid._SURFACE) & (side < 0), -d, d)
    signed[near] = np.where(surface.wall[sample], at_wall, d - _SHEET_HALF)
    return signed.clip(-FINE_BAND, FINE_BAND).astype(np.float32), nearest


def attributes_of(surface: Surface, coords: np.ndarray, nearest: np.ndarray, resolution: int) -> np.ndarray:
    """(N, 10) uint8: colour 3, normal 3, offset 3, coverage; nearest: by lattice vertex, from ``lattice_distance``."""
    x, y, z = 2 * coords.astype(np.int64).T + 1
    sample = nearest[x, y, z].copy()
    lost = np.flatnonzero(sample < 0)
    if len(lost):  # where the prepared sheet is thicker than the lattice's band
        from scipy.spatial import cKDTree

        centres = (coords[lost] + 0.5) / resolution - 0.5
        sample[lost] = cKDTree(surface.points).query(centres)[1]
    centre = (coords.astype(np.float32) + 0.5) / resolution - 0.5
    normal = _towards(surface, sample, centre)
    gap = centre - surface.points[sample]
    along = (gap * normal).sum(axis=1, keepdims=True)
    across = gap - along * normal
    reach = solid._DISC_RADIUS / (2 * resolution)
    length = np.linalg.norm(across, axis=1, keepdims=True)
    foot = surface.points[sample] + across * np.minimum(1, reach / np.maximum(length, 1e-9))
    foot += np.where(surface.wall[sample], 0, _SHEET_HALF / (2 * resolution))[:, None] * normal
    offset = (foot - centre) * resolution

    grid = np.full((resolution,) * 3, -1, dtype=np.int64)
    grid[tuple(coords.astype(np.int64).T)] = np.arange(len(coords))
    voxel = ((surface.points + 0.5) * resolution).astype(np.int64).clip(0, resolution - 1)
    owner = grid[tuple(voxel.T)]
    inside = np.flatnonzero(owner >= 0)
    owner = owner[inside]
    count = np.bincount(owner, minlength=len(coords))[:, None]
    parts = np.concatenate([surface.colors[inside], _towards(surface, inside, centre[owner])], axis=1)
    total = np.stack([np.bincount(owner, parts[:, k], len(coords)) for k in range(6)], axis=1)
    color = np.where(count > 0, total[:, :3] / np.maximum(count, 1), surface.colors[sample])
    length = np.linalg.norm(total[:, 3:], axis=1, keepdims=True)
    normal = np.where(length > 0.3 * np.maximum(count, 1), total[:, 3:] / np.maximum(length, 1e-9), normal)
    normal = normal * 127.5 + 127.5
    offset = offset.clip(-OFFSET_LIMIT, OFFSET_LIMIT) * (127.5 / OFFSET_LIMIT) + 127.5
    coverage = np.minimum(count / _FULL_COVERAGE, 1) * 255
    # Halves go away from zero on both sides of the middle, so that a mirrored object has mirrored bytes.
    return np.floor(np.concatenate([color, normal, offset, coverage], axis=1) + 0.5).clip(0, 255).astype(np.uint8)


def _towards(surface: Surface, sample: np.ndarray, places: np.ndarray) -> np.ndarray:
    """(N, 3) normals of the samples; a sheet's point to the side of ``places`` (N, 3)."""
    normals = surface.normals[sample]
    behind = ((places - surface.points[sample]) * normals).sum(axis=1) < 0
    return np.where((behind & ~surface.wall[sample])[:, None], -normals, normals)


def points_of(mesh: Mesh, surface: Surface, resolution: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """POINTS surface points, even by area: points int16, normals int8, colours uint8, each (POINTS, 3)."""
    fine = 2 * resolution
    random = np.random.default_rng(seed)
    order = np.argsort(surface.cells, kind="stable")
    sorted_cells = surface.cells[order]
    found: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for attempt in range(4):
        drawn, normals = sample_surface(mesh, 2 * POINTS * 2**attempt, seed + attempt)
        cells = np.rint((drawn + 0.5) * fine).astype(np.int64).clip(0, fine)
        flat = np.ravel_multi_index(tuple(cells.T), (fine + 1,) * 3)
        place = np.minimum(np.searchsorted(sorted_cells, flat), len(order) - 1)
        kept = sorted_cells[place] == flat
        found = [(drawn[kept], normals[kept], order[place[kept]])]
        if kept.sum() >= POINTS:
            break
    points, normals, sample = found[0]
    area = len(points) / len(drawn) * _area(mesh) * fine * fine
    floor = np.arange(len(surface.points) - surface.floor, len(surface.points))
    share = len(floor) / max(len(floor) + area, 1)
    from_floor = random.integers(0, max(len(floor), 1), round(POINTS * share) if len(floor) else 0)
    if not len(points) and not len(from_floor):
        points, normals, sample = surface.points, surface.normals, np.arange(len(surface.points))
    chosen = np.resize(random.permutation(len(points)), POINTS - len(from_floor)) if len(points) else np.zeros(0, int)
    sample = np.concatenate([sample[chosen], floor[from_floor]]).astype(np.int64)
    points = np.concatenate([points[chosen], surface.points[floor[from_floor]]])
    normals = np.concatenate([normals[chosen], surface.normals[floor[from_floor]]])
    agree = (normals * surface.normals[sample]).sum(axis=1, keepdims=True) >= 0
    either = random.random((len(sample), 1)) < 0.5
    sheet = ~surface.wall[sample][:, None]
    normals = np.where(np.where(sheet, either, agree), normals, -normals)
    points = points + np.where(sheet, _SHEET_HALF / fine, 0) * normals
    return (
        np.rint(points.clip(-0.5, 0.5) * 65534).astype(np.int16),
        np.rint(normals * 127).astype(np.int8),
        surface.colors[sample],
    )


def _area(mesh: Mesh) -> float:
    a, b, c = (mesh.vertices[mesh.faces[:, k]] for k in range(3))
    return float(np.linalg.norm(np.cross(b - a, c - a), axis=1).sum() / 2)


def structure_sample(mesh: Mesh, sdf: np.ndarray, band: float, seed: int = 0) -> dict[str, np.ndarray]:
    """The arrays of one sample, without row ends.

    mesh: in model space. sdf: (R, R, R) int8, its prepared distance, 127 = ``band`` voxels, which must be wider than
    BAND. Raises TriptychError for a mesh without a visible surface, and where no voxel lies in the band.
    """
    if band <= BAND:
        raise TriptychError(f"the prepared distances reach {band} voxels, {BAND} are needed: prepare the folder again")
    resolution = len(sdf)
    near = np.abs(sdf.astype(np.int16)) < BAND * 127 / band
    coords = np.argwhere(near)
    if not len(coords):
        raise TriptychError("no voxel lies near the surface: the prepared solid is empty")
    surface = surface_of(mesh, resolution)
    distance, nearest = lattice_distance(surface, resolution)
    fine = distance[lattice_mask(coords, resolution)]
    points, normals, colors = points_of(mesh, surface, resolution, seed)
    return {
        "coords": coords.astype(np.uint8),
        "sdf": sdf[near],
        "attributes": attributes_of(surface, coords, nearest, resolution),
        "fine_sdf": np.rint(fine * (127 / FINE_BAND)).astype(np.int8),
        "points": points,
        "point_normals": normals,
        "point_colors": colors,
    }


# ---- a whole prepared folder


@dataclass(frozen=True)
class Item:
    """One sample to structure: its record's key and hash, its source, its row in the prepared shard, its yaw."""

    source: Source
    file_sha256: str | None
    row: int
    yaw_deg: float


@dataclass(frozen=True)
class ShardJob:
    name: str
    items: tuple[Item, ...]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", type=Path, metavar="DATA", help="a prepared folder")
    parser.add_argument("sources", nargs="+", type=Path, metavar="SOURCE", help="the folders it was prepared from")
    parser.add_argument("--workers", type=int, default=None, help="processes (default: one a core; 0: in this one)")
    parser.add_argument("--all-yaws", action="store_true", help="also the turned copies, not only the first")
    parser.add_argument("--shards", type=int, default=None, help="at most this many shards (a trial)")
    parser.add_argument("--index-split", nargs="+", default=["train"], help="as for prepare")
    parser.add_argument("--features", metavar="NAME", help="also cache image features: an encoder, or module:function")
    parser.add_argument("--feature-views", type=int, default=150, help="pictures of each object")
    parser.add_argument("--feature-size", type=int, default=518, help="pixels of a picture's side")
    parser.add_argument("--device", default="cpu", help="of the image encoder")


def main(args: argparse.Namespace) -> int:
    sources = find_sources(args.sources, tuple(args.index_split))
    summary = structure(args.data, sources, workers=args.workers, all_yaws=args.all_yaws, limit=args.shards)
    print(
        f"{summary['samples']} samples in {args.data / FOLDER}, {summary['skipped']} skipped, "
        f"{summary['absent']} not among the sources"
    )
    if args.features:
        from .features import FeatureOptions, cache_features, load_extractor

        name = args.features.rpartition(":")[2]
        options = FeatureOptions(name, views=args.feature_views, size=args.feature_size)
        jobs = plan(args.data, sources, args.all_yaws)[0][: args.shards]
        made = cache_features(args.data, jobs, load_extractor(args.features, args.device), options)
        print(f"features {name!r} of {made} more samples")
    return 0


def structure(
    data: Path, sources: list[Source], workers: int | None = None, *, all_yaws: bool = False, limit: int | None = None
) -> dict[str, int]:
    """Writes the second-stage arrays of a prepared folder, shard by shard; finished shards are kept.

    workers: processes, None for one a core, 0 for this one. Returns the numbers of samples, of skipped ones (each with
    its reason in the shard's JSON) and of objects that are absent from ``sources``. Raises TriptychError: not a
    prepared folder, no source for any of its objects, another process writing there, a full disk.
    """
    if workers is not None and workers < 0:
        raise TriptychError(f"--workers must be 0 or more, got {workers}")
    jobs, absent = plan(data, sources, all_yaws)
    jobs = jobs[:limit]
    out = data / FOLDER
    out.mkdir(exist_ok=True)
    with _alone(out):
        remove_leftovers(out)
        todo = [job for job in jobs if not _is_done(out, job)]
        build = partial(build_shard, data=data)
        with tqdm(total=sum(len(job.items) for job in todo), unit="object", desc="structure", smoothing=0.1) as bar:
            for count in over_shards(build, todo, _cores() if workers is None else workers):
                bar.update(count)
    reports = [json.loads((out / f"{job.name}.json").read_text(encoding="utf-8")) for job in jobs]
    skipped = sum(len(report["skipped"]) for report in reports)
    return {"samples": sum(len(r["rows"]) for r in reports), "skipped": skipped, "absent": absent}


def plan(data: Path, sources: list[Source], all_yaws: bool = False) -> tuple[list[ShardJob], int]:
    """What to build, by prepared shard, and how many of the folder's objects have no source. The axes of a file are
    those that it was prepared with, whatever ``sources`` say."""
    path = data / "index.json"
    if not path.is_file():
        raise TriptychError(f"{path} is missing: run `python -m trainer prepare SOURCE --out {data}` first")
    by_key = {source.key: source for source in sources}
    records = [r for r in json.loads(path.read_text(encoding="utf-8"))["records"] if r["status"] == "ok"]
    known = [r for r in records if r["key"] in by_key]
    if not known:
        raise TriptychError(f"no object of {data} is among the sources: name the folders that it was prepared from")
    shards: dict[str, list[Item]] = {}
    for record in known:
        turns = list(zip(record["rows"], record["yaws_deg"], strict=True))
        for row, yaw in turns if all_yaws else turns[:1]:
            source = replace(by_key[record["key"]], frame=tuple(record.get("frame", OUR_FRAME)))
            item = Item(source, record["file_sha256"], row, yaw)
            shards.setdefault(record["shard"], []).append(item)
    return [ShardJob(name, tuple(items)) for name, items in sorted(shards.items())], len(records) - len(known)


def _is_done(out: Path, job: ShardJob) -> bool:
    try:
        report = json.loads((out / f"{job.name}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    arrays = out / f"{job.name}.safetensors"
    same = report.get("format") == FORMAT and report["wanted"] == _wanted(job)
    return same and (not report["rows"] or _is_whole(arrays))


def _wanted(job: ShardJob) -> list[list[Any]]:
    return [[item.source.key, item.row, item.file_sha256] for item in job.items]


def over_shards(build: Callable[[Job], int], jobs: list[Job], workers: int) -> Iterator[int]:
    """``build`` of every job, in order, in ``workers`` processes of one thread each, or here with 0."""
    if workers == 0 or not jobs:
        yield from map(build, jobs)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        min(workers, len(jobs)), context, initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        yield from pool.map(build, jobs)


def build_shard(job: ShardJob, data: Path) -> int:
    """Builds and writes one shard; returns its number of items."""
    band = float(json.loads((data / "options.json").read_text(encoding="utf-8"))["sdf_band"])
    samples: list[dict[str, np.ndarray]] = []
    rows: list[int] = []
    skipped: list[dict[str, Any]] = []
    with safe_open(str(data / "shards" / f"{job.name}.safetensors"), framework="numpy") as shard:
        fields = shard.get_slice("sdf")
        for item in job.items:
            try:
                samples.append(_build(item, fields[item.row], band))
                rows.append(item.row)
            except (TriptychError, OSError, *_UNFORESEEN) as error:
                skipped.append({"key": item.source.key, "row": item.row, "reason": f"{type(error).__name__}: {error}"})
    out = data / FOLDER
    if samples:
        arrays = ragged(samples, rows)
        _write(out / f"{job.name}.safetensors", lambda temporary: save_file(arrays, str(temporary)))
    write_json(out / f"{job.name}.json", {"format": FORMAT, "wanted": _wanted(job), "rows": rows, "skipped": skipped})
    return len(job.items)


def mesh_of(item: Item) -> Mesh:
    """The mesh as it was prepared: in our frame, normalised, turned. Raises TriptychError when its file has changed."""
    path = item.source.path
    if item.file_sha256 is not None and fingerprint(path)["file_sha256"] != item.file_sha256:
        raise TriptychError(f"{path.name} has changed since it was prepared: run prepare again")
    return turned(framed(read_mesh(path), item.source.frame).normalized(), item.yaw_deg)


def _build(item: Item, sdf: np.ndarray, band: float) -> dict[str, np.ndarray]:
    mesh = mesh_of(item)
    seed = int.from_bytes(item.source.key.encode()[-6:], "little") + item.row
    return structure_sample(mesh, sdf, band, seed)


def ragged(samples: list[dict[str, np.ndarray]], rows: list[int]) -> dict[str, np.ndarray]:
    """One shard's arrays: what has a row a voxel or vertex is joined, what is fixed a sample is stacked."""
    arrays = {
        key: np.ascontiguousarray((np.stack if key in _PER_SAMPLE else np.concatenate)([s[key] for s in samples]))
        for key in samples[0]
    }
    arrays["rows"] = np.array(rows, dtype=np.int32)
    arrays["voxel_ends"] = np.cumsum([len(s["coords"]) for s in samples], dtype=np.int64)
    arrays["vertex_ends"] = np.cumsum([len(s["fine_sdf"]) for s in samples], dtype=np.int64)
    return arrays
