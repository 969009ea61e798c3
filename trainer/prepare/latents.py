"""Latents and image tokens of prepared objects for training at the published shape: `python -m trainer latents`.

Writes the cached folder of trainer/cached.py with the encoders of one bundle:

- structure: the bundle's structure encoder on the voxels that the surface touches (of the prepared 64^3 field).
- coords, latents: its structured-latent encoder on the same voxels' cached image features (`trainer structure
  --features`), or on their attributes where the encoder takes ten channels; the posterior's mean, as published.
- conditions: an image encoder's tokens of views under one random light an object, cut to 1.2 times the object and on
  black, as published. With the meshes' folders at hand the rig's four views and random ones, with the published range
  of distances, are rendered; without, the four prepared views are used.
- images, azimuths: the rig's four views as they are, for lifting.

One file an object: a stopped call goes on where it was, `--part I/N` shares the work among processes, and a last call
without it writes the index, with mean and deviation of the latents. Objects that cannot be encoded are named there.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from trainer.cached import ENCODER_SIZE, SURFACE, existing_record, published_coords, write_index, write_object
from trainer.data import PreparedData, relight
from trainer.names import import_named
from trainer.order import stream_seed
from trainer.structured import StructuredData, decode_attributes
from triptych.bundles.bundle import Bundle, load_bundle
from triptych.bundles.published import PublishedBundle
from triptych.errors import TriptychError
from triptych.geometry.cameras import VIEW_AZIMUTHS_DEG, Camera, rig_cameras
from triptych.images.published import on_black
from triptych.models.image_conditioning import ImageEncoder, encoder_info, load_image_encoder
from triptych.models.slat_encoder import SLatEncoder
from triptych.render.views import render_views
from triptych.sparse.tensor import SparseTensor

from .build import _UNFORESEEN
from .sources import find_sources
from .structured import Item, mesh_of, plan

Extractor = Callable[[Tensor], Tensor]
DEFAULT_ENCODER = "dinov2_vitl14_reg"
ATTRIBUTES = 10  # channels of an encoder that reads voxel attributes
FOV_DEG = (10.0, 70.0)  # of the published condition views; the object's sphere of radius sqrt(3)/2 fills the frame
PUBLISHED_FRAME = ("+Z", "-Y")
RIG = rig_cameras(VIEW_AZIMUTHS_DEG)


# ---- image encoders


def dinov2(device: torch.device) -> Extractor:
    """What the published latent encoder's features are made of: DINOv2 ViT-L/14 with registers, all tokens, no norm."""
    return raw_tokens(load_image_encoder(DEFAULT_ENCODER).to(device))


def raw_tokens(encoder: ImageEncoder) -> Extractor:
    """The tokens of an image encoder before any norm: pictures (B, 3, S, S) 0-1 -> (B, T, C) float32."""

    def extract(pictures: Tensor) -> Tensor:
        weight = next(encoder.vit.parameters())
        pixels = ((pictures.to(weight.device, torch.float32) - encoder.mean) / encoder.std).type(weight.dtype)
        return cast(Tensor, encoder.vit(pixel_values=pixels).last_hidden_state.float())

    return extract


def token_extractor(name: str, device: torch.device) -> Extractor:
    """Pictures -> the tokens that condition the flows; name: see `load_image_encoder`, or ``module:function`` of a
    device. Raises TriptychError as they do."""
    if ":" in name:
        return cast(Extractor, import_named(name, {}, "image encoder")(device))
    return load_image_encoder(name).to(device)


# ---- one object


@dataclass(frozen=True)
class LatentOptions:
    """features: cached image features by name, for an encoder that reads them. views: pictures of an object when its
    mesh is at hand, the rig's four first. render_size: pixels they are drawn at; encoder_size: what the image encoder
    sees; image_size: of the stored pictures. batch: pictures at a time. structured: make structured latents."""

    features: str = "dinov2"
    image_encoder: str = DEFAULT_ENCODER
    views: int = 8
    render_size: int = 1024
    encoder_size: int = ENCODER_SIZE
    image_size: int = 256
    batch: int = 8
    structured: bool = True

    def __post_init__(self) -> None:
        for name, least in (("views", 4), ("render_size", 16), ("encoder_size", 1), ("image_size", 1), ("batch", 1)):
            if getattr(self, name) < least:
                raise TriptychError(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(self, name)}")


@dataclass(frozen=True)
class Encoders:
    """The networks that make an object's arrays. upright: the published frame, +Z up and front -Y."""

    structure: nn.Module | None
    structured: SLatEncoder | None
    tokens_of: Extractor
    upright: bool
    device: torch.device


@dataclass(frozen=True)
class Place:
    """One object: its key in the cache, its split, its number in it, and its samples in the prepared folder."""

    key: str
    split: str
    number: int
    prepared: PreparedData
    prepared_index: int
    voxels: StructuredData | None
    voxel_index: int
    item: Item | None  # where its mesh is


def condition_cameras(count: int, generator: np.random.Generator) -> list[Camera]:
    """The rig's four, then random directions from random distances, fields of view from 10 to 70 degrees."""
    radius = math.sqrt(3) / 2
    near, far = (radius / math.sin(math.radians(fov / 2)) for fov in reversed(FOV_DEG))
    cameras = list(RIG)
    for _ in range(count - len(RIG)):
        distance = generator.uniform(far**-2, near**-2) ** -0.5
        elevation = math.degrees(math.asin(generator.uniform(-0.99, 0.99)))
        fov = 2 * math.degrees(math.asin(radius / distance))
        cameras.append(Camera(generator.uniform(0, 360), elevation, distance, half_extent=None, fov_deg=fov))
    return cameras


def pictures_of(place: Place, options: LatentOptions) -> Tensor:
    """(V, 4, S, S) straight RGBA under one random light, the rig's four views first."""
    generator = np.random.default_rng(stream_seed(0, place.key, place.number))
    if place.item is None:
        sample = place.prepared[place.prepared_index]
        return relight(sample["albedo"], sample["normal"], generator)
    mesh = mesh_of(place.item)
    cameras = condition_cameras(options.views, generator)
    drawn = render_views(mesh, cameras, options.render_size)
    rgba = torch.cat([drawn.albedo, drawn.alpha], dim=1).permute(0, 2, 3, 1)
    normal = drawn.normal.permute(0, 2, 3, 1) * 127.5 + 127.5
    rotations = torch.stack([camera.rotation() for camera in cameras])
    albedo, normals = ((x + 0.5).to(torch.uint8).numpy() for x in (rgba * 255, normal))
    return relight(albedo, normals, generator, range(len(cameras)), rotations=rotations)


@torch.no_grad()
def tokens(pictures: Tensor, encoders: Encoders, options: LatentOptions) -> Tensor:
    """(V, M, C) tokens of RGBA pictures, each cut to its object on black as the published pipeline does."""
    found = []
    for picture in pictures:
        pixels = (picture.permute(1, 2, 0) * 255 + 0.5).to(torch.uint8).numpy()
        try:
            found.append(on_black(Image.fromarray(pixels), options.encoder_size))
        except TriptychError:  # a rod seen from its end: too few pixels to enlarge, but the rig's views belong together
            found.append(_resized((picture[:3] * picture[3:])[None], options.encoder_size)[0])
    parts = torch.stack(found).to(encoders.device).split(options.batch)
    return torch.cat([encoders.tokens_of(part).float().cpu() for part in parts])


@torch.no_grad()
def encode(place: Place, encoders: Encoders, options: LatentOptions) -> dict[str, Tensor]:
    """One object's arrays, as the table of trainer/cached.py has them."""
    band = float(place.prepared.options["sdf_band"])
    side = int(place.prepared.options["resolution"])
    field = place.prepared.field(place.prepared_index)
    coords = np.argwhere(np.abs(field.astype(np.float32)) * (band / 127) < SURFACE)
    if not len(coords):
        raise TriptychError("no voxel touches the surface: the prepared solid is empty")
    arrays: dict[str, Tensor] = {}
    if encoders.structure is not None:
        there = published_coords(coords, side) if encoders.upright else coords
        volume = np.zeros((1, 1, side, side, side), dtype=np.float32)
        volume[(0, 0, *there.T)] = 1
        arrays["structure"] = encoders.structure(torch.from_numpy(volume).to(encoders.device))[0].float()
    if encoders.structured is not None and place.voxels is not None:
        arrays |= _structured(place, encoders)
    pictures = pictures_of(place, options)
    arrays["conditions"] = tokens(pictures, encoders, options)
    arrays["images"] = (_resized_rgba(pictures[: len(RIG)], options.image_size) * 255 + 0.5).to(torch.uint8)
    arrays["azimuths"] = torch.tensor(VIEW_AZIMUTHS_DEG)
    return arrays


def _structured(place: Place, encoders: Encoders) -> dict[str, Tensor]:
    data, encoder = place.voxels, encoders.structured
    assert data is not None and encoder is not None
    item = data[place.voxel_index]
    near = np.abs(item["sdf"].astype(np.float32)) * (data.band / 127) < SURFACE
    coords = item["coords"][near].astype(np.int64)
    if data.features:
        feats = torch.from_numpy(item["features"][near]).float()
    else:
        feats = decode_attributes(torch.from_numpy(item["attributes"][near]))
    if encoders.upright:
        coords = published_coords(coords, data.resolution)
        order = np.lexsort(coords.T[::-1])  # as a voxel grid lists them
        coords, feats = coords[order], feats[torch.from_numpy(order)]
    rows = F.pad(torch.from_numpy(np.ascontiguousarray(coords)).int(), (1, 0)).to(encoders.device)
    latents = encoder(SparseTensor(feats.to(encoders.device), rows, 1, data.resolution))
    return {"coords": rows[:, 1:].to(torch.uint8), "latents": cast(SparseTensor, latents).feats.float()}


def _resized(pictures: Tensor, size: int) -> Tensor:
    if pictures.shape[-1] == size:
        return pictures
    return F.interpolate(pictures, (size, size), mode="bilinear", antialias=True, align_corners=False).clamp(0, 1)


def _resized_rgba(rgba: Tensor, size: int) -> Tensor:
    small = _resized(torch.cat([rgba[:, :3] * rgba[:, 3:], rgba[:, 3:]], dim=1), size)
    return torch.cat([small[:, :3] / small[:, 3:].clamp_min(1e-4), small[:, 3:]], dim=1).clamp(0, 1)


# ---- a whole folder


def load_encoders(bundle: Bundle, options: LatentOptions, device: torch.device) -> Encoders:
    """The bundle's encoders, in float16 on a GPU as published, and the image encoder.

    Raises TriptychError when the bundle has none of the two, or a frame that is neither the published one nor ours.
    """
    dtype = torch.float32 if device.type == "cpu" else torch.float16
    frame = (bundle.manifest.up, bundle.manifest.front)
    if frame not in (PUBLISHED_FRAME, ("+Y", "+Z")):
        raise TriptychError(f"the bundle {bundle.name} has {frame[0]} up and {frame[1]} in front: that is not known")
    structure = bundle.network("structure_encoder", dtype).to(device) if bundle.has("structure_encoder") else None
    structured = None
    if options.structured and bundle.has("slat_encoder"):
        structured = cast(SLatEncoder, bundle.network("slat_encoder", dtype).to(device))
    if structure is None and structured is None:
        raise TriptychError(f"the bundle {bundle.name} has no encoder: choose one with structure_encoder, slat_encoder")
    extractor = token_extractor(options.image_encoder, device)
    return Encoders(structure, structured, extractor, frame == PUBLISHED_FRAME, device)


def places_of(
    data: Path, encoder: SLatEncoder | None, features: str, items: dict[tuple[str, int], Item] | None, limit: int | None
) -> list[Place]:
    """Every object to encode, train first. Raises TriptychError where the folder lacks what the encoder reads."""
    places: list[Place] = []
    for split in ("train", "validation"):
        prepared = PreparedData(data, split)
        voxels, row_of = _voxels(data, split, encoder, features)
        numbers = range(min(len(prepared), limit or len(prepared)))
        for number in numbers:
            shard, row, _ = prepared.rows[number]
            if (voxels is not None and (shard, row) not in row_of) or (items is not None and (shard, row) not in items):
                continue  # turned copies are only structured with --all-yaws
            item = items[shard, row] if items is not None else None
            index = row_of.get((shard, row), 0)
            places.append(Place(f"{shard}_{row}", split, number, prepared, number, voxels, index, item))
    if not places:
        raise TriptychError(f"{data} has no object that is structured and among the sources: check both")
    return places


def _voxels(
    data: Path, split: str, encoder: SLatEncoder | None, features: str
) -> tuple[StructuredData | None, dict[tuple[str, int], int]]:
    if encoder is None:
        return None, {}
    attributes = encoder.in_channels == ATTRIBUTES
    voxels = StructuredData(data, split, None if attributes else features)
    if voxels.resolution != encoder.resolution:
        raise TriptychError(
            f"{data} has voxels of {voxels.resolution}^3, the encoder takes {encoder.resolution}^3: prepare it again "
            f"with --resolution {encoder.resolution}"
        )
    found = len(voxels[0]["attributes" if attributes else "features"][0])
    if found != encoder.in_channels:
        raise TriptychError(
            f"the features {features!r} of {data} have {found} channels, the encoder takes {encoder.in_channels}: "
            "name others with --features"
        )
    return voxels, {(shard, voxels.prepared_row(i)): i for i, (shard, _, _) in enumerate(voxels.rows)}


def cache_latents(
    data: Path,
    out: Path,
    bundle: Bundle,
    options: LatentOptions,
    items: dict[tuple[str, int], Item] | None = None,
    *,
    limit: int | None = None,
    part: tuple[int, int] = (0, 1),
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Encodes every object of a prepared folder into the cached folder ``out``; whole files of an earlier call with the
    same encoders and options are kept. part (i, n): every n-th object from the i-th on, without an index.

    items: where the meshes are, by shard and row; None uses the prepared views. Returns how many objects are there,
    how many of them are new, and the skipped ones with their reasons.
    """
    encoders = load_encoders(bundle, options, torch.device(device))
    kinds = ("structure_encoder", "slat_encoder")
    hashes = {name: bundle.component(name).sha256 for name in kinds if bundle.has(name)}
    made = {"networks": hashes, "meshes": items is not None} | asdict(options)
    made.pop("batch")  # changes nothing
    identity = hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()
    places = places_of(data, encoders.structured, options.features, items, limit)[part[0] :: part[1]]
    records, skipped, new = [], [], 0
    for place in tqdm(places, unit="object", desc="latents", smoothing=0.1):
        record = existing_record(out, place.key, place.split, identity)
        if record is None:
            try:
                arrays = encode(place, encoders, options)
            except (TriptychError, OSError, *_UNFORESEEN) as error:
                if isinstance(error, torch.OutOfMemoryError):
                    said = f"out of memory at {place.key}: use a smaller --batch than {options.batch}"
                    raise TriptychError(said) from error
                skipped.append({"key": place.key, "reason": f"{type(error).__name__}: {error}"})
                continue
            record = write_object(out, place.key, place.split, identity=identity, **arrays)
            new += 1
        records.append(record)
    if part[1] == 1:
        if not records:
            raise TriptychError(f"no object could be encoded; the first: {skipped[0]['key']}, {skipped[0]['reason']}")
        write_index(out, records, made=made, skipped=skipped)
    return {"objects": len(records), "new": new, "skipped": skipped}


# ---- the command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", type=Path, metavar="DATA", help="a prepared folder, for structured latents with arrays")
    parser.add_argument("sources", nargs="*", type=Path, metavar="SOURCE", help="the folders it was prepared from")
    parser.add_argument("--bundle", required=True, help="whose encoders: a folder, or a Hugging Face repository")
    parser.add_argument("--out", type=Path, required=True, help="the cached folder; an unfinished one goes on")
    parser.add_argument("--features", default="dinov2", help="cached voxel features (default: dinov2)")
    parser.add_argument(
        "--image-encoder", help="of the tokens: name, folder or module:function (default: the bundle's)"
    )
    parser.add_argument("--views", type=int, default=8, help="pictures of each object, of its mesh (default: 8)")
    parser.add_argument("--render-size", type=int, default=1024, help="pixels that a mesh is drawn at")
    parser.add_argument("--encoder-size", type=int, help="pixels that the image encoder sees (default: 518)")
    parser.add_argument("--image-size", type=int, default=256, help="pixels of the stored pictures")
    parser.add_argument("--batch", type=int, default=8, help="pictures at a time")
    parser.add_argument("--no-structured", action="store_true", help="only structure latents and tokens")
    parser.add_argument("--limit", type=int, help="at most this many samples of each split (a trial)")
    parser.add_argument("--part", default="0/1", metavar="I/N", help="every N-th object from I on, without an index")
    parser.add_argument("--index-split", nargs="+", default=["train"], help="as for prepare")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def main(args: argparse.Namespace) -> int:
    bundle = load_bundle(args.bundle)
    own = bundle.image_cond_model if isinstance(bundle, PublishedBundle) else DEFAULT_ENCODER
    name = args.image_encoder or own
    info = encoder_info(name)
    options = LatentOptions(
        features=args.features,
        image_encoder=name,
        views=args.views,
        render_size=args.render_size,
        encoder_size=args.encoder_size or (info.image_size if info else ENCODER_SIZE),
        image_size=args.image_size,
        batch=args.batch,
        structured=not args.no_structured,
    )
    items = None
    if args.sources:
        sources = find_sources(args.sources, tuple(args.index_split))
        items = dict(_located(plan(args.data, sources, all_yaws=True)[0]))
    part = _part(args.part)
    found = cache_latents(args.data, args.out, bundle, options, items, limit=args.limit, part=part, device=args.device)
    for skip in found["skipped"][:5]:
        print(f"skipped {skip['key']}: {skip['reason']}")
    index = "" if part[1] == 1 else "; the index is written by a last call without --part"
    skipped = len(found["skipped"])
    print(f"{found['objects']} objects in {args.out}, {found['new']} of them new, {skipped} skipped{index}")
    return 0


def _located(jobs: list[Any]) -> Iterator[tuple[tuple[str, int], Item]]:
    for job in jobs:
        yield from (((job.name, item.row), item) for item in job.items)


def _part(text: str) -> tuple[int, int]:
    first, _, count = text.partition("/")
    if not (first.isdigit() and count.isdigit() and int(first) < int(count)):
        raise TriptychError(f"--part is {text!r}: give I/N with I from 0 to N - 1, such as 0/4")
    return int(first), int(count)
