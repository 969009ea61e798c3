"""Latents and captions of view sheets, made once: what a multi-view Flux model trains on.

`python -m trainer sheets DATA --model FOLDER --out CACHE` reads prepared views, lights and recolours them, lays them
out as sheets and references (prepare/sheets.py), and encodes both with the model's own autoencoder. A prepared sample
gives several variants; each is a function of (seed, object, variant), so a second run makes the same bytes.

One shard is ``NAME.safetensors`` and ``NAME.json`` in ``CACHE``:

| array | shape | meaning |
|---|---|---|
| target | (N, C, 2P, 2P) bfloat16 | normalised, patchified latents of the sheet |
| references | (M, C, P, P) bfloat16 | of all references of all samples, one after the other |
| ends | (N,) int64 | where each sample's references end |

and in the JSON a list of samples: ``key``, ``split``, ``captions``, ``given`` (names of the views that are
references), ``faces_front`` (whether "front" is the front that the source meant: a sheet made from words alone has to
be one of these), ``made_of`` (see `Place`: a sheet of anything else is made again).
Views larger than the panel are averaged down; smaller ones are an error, not enlarged.

With --photos, references of a share of the variants are photographs (prepare/photos.py) instead of relit rig views;
with --text, the embeddings of every prompt that training can draw are cached too (trainer/sheet_data.py).
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from trainer.captions import caption, colour_words
from trainer.data import PreparedData, draw_recolouring, symmetric_sample
from trainer.flux_base import encoded_references, encoder_of, latent_statistics
from trainer.order import stream_seed
from trainer.parallel import say
from triptych.errors import TriptychError
from triptych.flux.card import field_problem
from triptych.flux.panels import with_mirror_images
from triptych.geometry.cameras import VIEW_NAMES

from .photos import Photos, photo_references, photograph_all, symmetric_photos
from .photos import add_arguments as add_photo_arguments
from .run import _alone, _cores
from .shards import _is_whole, _write, remove_leftovers, write_json
from .sheets import canonical_shade, grid, on_background, photo_views, recoloured
from .structured import over_shards

FORMAT = 1
INDEX = "sheets.json"
SAMPLES_PER_SHARD = 256


@dataclass(frozen=True)
class SheetOptions:
    """panel: pixels of a view's side. background: sRGB. variants: of each prepared sample. captions: of each variant.
    lone_photo: share of variants whose only reference is the front view; the others get one to three views. photos:
    share of variants whose references are photographs.
    mirrored: every reference is followed by its mirror image, see `ViewsCard.mirrored`."""

    panel: int = 128
    background: tuple[float, float, float] = (1.0, 0.0, 1.0)
    variants: int = 2
    captions: int = 4
    lone_photo: float = 0.75
    seed: int = 0
    photos: float = 0.0
    mirrored: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.photos <= 1:
            raise TriptychError(f"--photo-share {self.photos} is a share from 0 to 1: give 0.5 for half of the sheets")
        if not 0 <= self.lone_photo <= 1:
            raise TriptychError(f"lone_photo {self.lone_photo} is a share from 0 to 1")
        for option, field, value in (
            ("panel", "panel_size", self.panel),
            ("background", "background", list(self.background)),
        ):
            if wanted := field_problem(field, value):
                raise TriptychError(f"--{option} is {value}, it has to be {wanted}")
        if self.variants < 1 or self.captions < 1:
            raise TriptychError(f"--variants {self.variants} and --captions {self.captions} have to be at least 1")

    def header(self) -> dict[str, Any]:
        """What a cache is known by; options that came later stand there only when they are used."""
        said = json.loads(json.dumps(asdict(self)))
        return {key: value for key, value in said.items() if value or key not in ("photos", "mirrored")}


@dataclass(frozen=True)
class Place:
    """One sample to make: prepared folder, split, row among the split's, variant. made_of: the object's key, its shard
    and row, the hashes of its file and geometry, its views' size, its name and category, as JSON values."""

    folder: str
    split: str
    row: int
    variant: int
    made_of: tuple[Any, ...]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", nargs="+", type=Path, metavar="DATA", help="prepared folders")
    parser.add_argument("--model", required=True, help="a folder with vae/ in diffusers' layout, or a repository")
    parser.add_argument("--out", type=Path, required=True, help="the cache, a new folder or one to go on with")
    parser.add_argument("--panel", type=int, default=128, help="pixels of a view's side; the sheet's is twice that")
    parser.add_argument("--background", default="1,0,1", help="sRGB colour behind the object, 0-1 (1,1,1 is white)")
    parser.add_argument("--variants", type=int, default=2, help="sheets of each prepared sample")
    parser.add_argument("--captions", type=int, default=4, help="captions of each sheet")
    parser.add_argument("--mirrored", action="store_true", help="give the mirror image of every reference too")
    add_photo_arguments(parser)
    parser.add_argument("--text", action="store_true", help="also cache the prompts' embeddings, in OUT/text")
    parser.add_argument("--template", help="of the prompts (default: the model's own)")
    parser.add_argument("--text-tokens", type=int, default=512, help="length that prompts are padded to")
    parser.add_argument("--workers", type=int, default=None, help="processes (default: one a core; 0: in this one)")
    parser.add_argument("--device", default="cpu", help="of the autoencoder; with cuda use --workers 0")


def options_of(args: argparse.Namespace) -> SheetOptions:
    """Raises TriptychError for a value out of range."""
    try:
        red, green, blue = (float(part) for part in args.background.split(","))
    except ValueError:
        raise TriptychError(
            f"--background {args.background!r}: three numbers from 0 to 1 with commas, such as 1,1,1"
        ) from None
    if args.workers is not None and args.workers < 0:
        raise TriptychError(f"--workers must be 0 or more, got {args.workers}")
    share = args.photo_share if args.photos else 0.0
    background = (red, green, blue)
    return SheetOptions(args.panel, background, args.variants, args.captions, photos=share, mirrored=args.mirrored)


def main(args: argparse.Namespace) -> int:
    options = options_of(args)
    workers = _cores() if args.workers is None else args.workers
    model = _model_folder(args.model)
    template = _prompt_template(args, model) if args.text else ""
    for sentence in photograph_all(args.data, args.photos, workers) if args.photos else ():
        print(sentence)
    count = cache_sheets(args.data, model, args.out, options, workers=workers, device=args.device)
    print(f"{count} sheets in {args.out}")
    if args.text:
        from trainer.tasks.flux_views import cache_words

        out = args.out / "text"
        total, fresh = cache_words(
            [args.out], model, out, template=template, tokens=args.text_tokens, device=args.device
        )
        print(f"{total} prompts in {out}, {fresh} of them new")
    return 0


def _prompt_template(args: argparse.Namespace, model: Path) -> str:
    """Of the prompts to cache, checked before sheets are made for hours."""
    from trainer.tasks.flux_views import template_of

    template = args.template or template_of(model)
    for option, field, value in (
        ("template", "prompt_template", template),
        ("text-tokens", "max_sequence_length", args.text_tokens),
    ):
        if wanted := field_problem(field, value):
            raise TriptychError(f"--{option} is {value!r}, it has to be {wanted}")
    return template


def _model_folder(source: str) -> Path:
    if Path(source).is_dir():
        return Path(source)
    from triptych.flux.hub import find_model

    return find_model(source).folder


def cache_sheets(
    data: Sequence[Path], model: Path, out: Path, options: SheetOptions, *, workers: int = 0, device: str = "cpu"
) -> int:
    """Writes the cache; finished shards are kept. Returns the number of sheets.

    Raises TriptychError: no autoencoder, views smaller than the panel, a cache of other options, a full disk.
    """
    if not (model / "vae" / "config.json").is_file():
        raise TriptychError(
            f"{model} has no vae/config.json: name a folder in diffusers' layout, or train flux_vae_tiny"
        )
    for folder in data:
        size = PreparedData(folder, "train").options["view_size"]
        if size < options.panel or size % options.panel:
            raise TriptychError(
                f"{folder} has views of {size} px, panels of {options.panel} px need a multiple of that: run prepare "
                f"with --view-size {options.panel}, or choose another --panel"
            )
    out.mkdir(parents=True, exist_ok=True)
    header = {"format": FORMAT, "options": options.header(), "vae": _vae_hash(model)}
    with _alone(out):
        remove_leftovers(out)
        _check_same(out / INDEX, header)
        jobs = _jobs(data, options)
        if all(name.startswith("train_") for name, _ in jobs):
            say(
                f"{', '.join(map(str, data))} has no validation objects, so that training will be validated on some of "
                "its own: prepare more objects to hold some out"
            )
        todo = [job for job in jobs if not _is_done(out, *job)]
        if stale := sum((out / f"{name}.json").is_file() for name, _ in todo):
            say(
                f"{stale} shards of {out} are not of the objects that {', '.join(map(str, data))} has now, or damaged: "
                "they are made again"
            )
            write_json(out / INDEX, header)  # unfinished: a run shall not read half of the old ones
        build = partial(_build_shard, model=model, out=out, options=options, device=device)
        with tqdm(total=sum(len(places) for _, places in todo), unit="sheet", desc="sheets", smoothing=0.1) as bar:
            for made in over_shards(build, todo, workers):
                bar.update(made)
        total = sum(len(places) for _, places in jobs)
        made_of = hashlib.sha256(json.dumps([[place.made_of for place in places] for _, places in jobs]).encode())
        facts = {"shards": [name for name, _ in jobs], "samples": total, "made_of_sha256": made_of.hexdigest()}
        write_json(out / INDEX, header | facts)
    return total


def _vae_hash(model: Path) -> str:
    """Of the tensors that encoding uses: a better decoder does not make latents worthless."""
    digest = hashlib.sha256()
    for file in sorted((model / "vae").glob("*.safetensors")):
        with safe_open(str(file), framework="pt") as tensors:
            for name in sorted(tensors.keys()):
                if name.split(".")[0] in ("encoder", "quant_conv", "bn"):
                    digest.update(name.encode())
                    digest.update(tensors.get_tensor(name).contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _check_same(path: Path, header: dict[str, Any]) -> None:
    if not path.exists():
        write_json(path, header)
        return
    have = json.loads(path.read_text(encoding="utf-8"))
    for key, value in header.items():
        if have.get(key) != value:
            raise TriptychError(f"{path.parent} holds sheets of another {key} ({have.get(key)}): choose another --out")


def _jobs(data: Sequence[Path], options: SheetOptions) -> list[tuple[str, list[Place]]]:
    """Shards with their samples; all variants of a sample lie in different shards."""
    jobs = []
    for number, folder in enumerate(data):
        for split in ("train", "validation"):
            prepared = PreparedData(folder, split, needed=split == "train")  # a small folder may hold none out
            made_of = _made_of(prepared)
            for variant in range(options.variants if split == "train" else 1):
                places = [Place(str(folder), split, row, variant, facts) for row, facts in enumerate(made_of)]
                for start in range(0, len(places), SAMPLES_PER_SHARD):
                    name = f"{split}_{number}_{variant}_{start // SAMPLES_PER_SHARD:04d}"
                    jobs.append((name, places[start : start + SAMPLES_PER_SHARD]))
    return jobs


def _made_of(prepared: PreparedData) -> list[tuple[Any, ...]]:
    size = prepared.options["view_size"]
    facts = ("file_sha256", "geometry_hash", "name", "category")
    return [(r["key"], shard, row, size, *(r.get(fact) for fact in facts)) for shard, row, r in prepared.rows]


def _is_done(out: Path, name: str, places: list[Place]) -> bool:
    try:
        samples = json.loads((out / f"{name}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    if len(samples) != len(places) or not _is_whole(out / f"{name}.safetensors"):
        return False
    return all(_is_of(one, list(place.made_of)) for one, place in zip(samples, places, strict=True))


def _is_of(said: dict[str, Any], made_of: list[Any]) -> bool:
    """Whether a cached sample is of these facts; one of an earlier version tells only the object's key and names."""
    if "made_of" in said:
        return said["made_of"] == made_of
    return [said.get("key"), said.get("name"), said.get("category")] == [made_of[0], *made_of[-2:]]


@dataclass(frozen=True)
class SheetSample:
    """One variant as pixels: sheet (3, 2S, 2S) float 0-1, references (V, 3, S, S), and what is said about it."""

    sheet: torch.Tensor
    references: torch.Tensor
    said: dict[str, Any]


def draw_sheet(
    sample: dict[str, np.ndarray],
    record: dict[str, Any],
    yaw: float,
    variant: int,
    options: SheetOptions,
    seed: int,
    photos: dict[str, np.ndarray] | None = None,
) -> SheetSample:
    """One variant of a prepared sample (see PreparedData), deterministic under ``seed``.

    The first variant has the object's own colours, later ones are recoloured. Objects that look to the front of their
    source keep doing so in the first variant and in half of the later ones; all others take any quarter turn. photos:
    of the sample (prepare/photos.py), None where there are none.
    """
    generator = np.random.default_rng(seed)
    stays = yaw == 0 and (variant == 0 or generator.random() < 0.5)
    symmetry = int(generator.integers(2)) * 4 if stays else int(generator.integers(8))
    sample = symmetric_sample(sample, symmetry)
    recolouring = draw_recolouring(generator) if variant else None
    if recolouring:
        sample = sample | {"albedo": recoloured(sample["albedo"], recolouring)}
    colours = colour_words(sample["albedo"])
    captions = [caption(record, colours, generator) for _ in range(options.captions)]
    given = draw_given(generator, options.lone_photo, np.any(sample["albedo"][..., 3], axis=(1, 2)))
    sheet = grid(on_background(canonical_shade(sample["albedo"], sample["normal"]), options.background))
    if photos is not None and options.photos and generator.random() < options.photos:
        photos = symmetric_photos(photos, symmetry)
        if recolouring:
            photos = photos | {"albedo": recoloured(photos["albedo"], recolouring)}
        references = photo_references(photos, given, generator, options.background)
    else:
        references = photo_views(sample, given, generator, options.background)
    if options.mirrored:
        references = with_mirror_images(references)
    said = {
        **{key: record.get(key) for key in ("key", "split", "name", "category", "licence", "attribution")},
        "captions": captions,
        "colours": colours,
        "given": [VIEW_NAMES[view] for view in given],
        "faces_front": stays,
    }
    factor = sheet.shape[-1] // (2 * options.panel)
    if factor > 1:
        sheet, references = (torch.nn.functional.avg_pool2d(x, factor) for x in (sheet, references))
    return SheetSample(sheet, references, said)


def draw_given(generator: np.random.Generator, lone_photo: float, seen: np.ndarray) -> list[int]:
    """Views that are given; one that shows nothing (a blade seen from its edge) is no photograph."""
    views = [view for view in range(4) if seen[view]]
    if generator.random() < lone_photo and seen[0]:
        return [0]
    count = min(int(generator.integers(1, 4)), len(views))
    return sorted(generator.permutation(views)[:count].tolist())


def _build_shard(job: tuple[str, list[Place]], model: Path, out: Path, options: SheetOptions, device: str) -> int:
    name, places = job
    encode = _encoder(str(model), device)
    data = PreparedData(places[0].folder, places[0].split)
    photos = Photos(places[0].folder) if options.photos else None
    said: list[dict[str, Any]] = []
    targets, references = [], []
    ends: list[int] = []
    for start in range(0, len(places), 8):
        drawn = []
        for place in places[start : start + 8]:
            shard, row, record = data.rows[place.row]
            yaw = float(record["yaws_deg"][record["rows"].index(row)])
            seed = stream_seed(options.seed, f"sheet/{record['key']}/{row}", place.variant)
            shots = photos.get(shard, row) if photos else None
            drawn.append(draw_sheet(data[place.row], record, yaw, place.variant, options, seed, shots))
        targets.append(encode(torch.stack([one.sheet for one in drawn])))
        references.append(encoded_references(encode, [one.references for one in drawn], _is_flux1(model)))
        for place, one in zip(places[start : start + 8], drawn, strict=True):
            said.append(one.said | {"made_of": place.made_of})
            ends.append((ends[-1] if ends else 0) + len(one.references))
    arrays = {"target": torch.cat(targets), "references": torch.cat(references), "ends": torch.tensor(ends)}
    _write(out / f"{name}.safetensors", lambda temporary: save_file(arrays, str(temporary)))
    write_json(out / f"{name}.json", said)
    return len(places)


_ENCODERS: dict[tuple[str, str], Any] = {}


def _encoder(model: str, device: str) -> Any:
    """Pictures (B, 3, H, W) 0-1 -> normalised, patchified latents (B, 4 C, H / 16, W / 16) bfloat16 on the CPU.

    A card gets one picture at a time: eight sheets of 1024 px at once take more than many have.
    """
    if (model, device) not in _ENCODERS:
        encode = sheet_encoder(model, device)
        _ENCODERS[model, device] = encode if torch.device(device).type == "cpu" else partial(_one_by_one, encode)
    return _ENCODERS[model, device]


def _one_by_one(encode: Any, pixels: torch.Tensor) -> torch.Tensor:
    return torch.cat([encode(picture[None]) for picture in pixels])


def _is_flux1(model: str | Path) -> bool:
    config = json.loads((Path(model) / "vae" / "config.json").read_text(encoding="utf-8"))
    return config.get("_class_name") == "AutoencoderKL"


def sheet_encoder(model: str, device: str) -> Any:
    """The encoder of the autoencoder in ``model``/vae, as Flux's pipelines apply it."""
    if _is_flux1(model):
        return encoder_of(Path(model), torch.device(device), "flux1-kontext")
    from diffusers import AutoencoderKLFlux2

    from trainer.linear_codec import linear_encoder
    from trainer.tasks.flux_vae import patchified

    vae: Any = AutoencoderKLFlux2.from_pretrained(model, subfolder="vae", torch_dtype=torch.float32).eval()
    mean, deviation = latent_statistics(vae)
    if components := linear_encoder(vae):

        def project(pixels: torch.Tensor) -> torch.Tensor:
            latents = patchified(components(pixels * 2 - 1))
            return ((latents - mean) / deviation).to(torch.bfloat16).contiguous()

        return project
    vae = vae.to(device, torch.bfloat16, memory_format=torch.channels_last)
    mean, deviation = latent_statistics(vae)

    @torch.inference_mode()
    def encode(pixels: torch.Tensor) -> torch.Tensor:
        pixels = (pixels * 2 - 1).to(device, torch.bfloat16, memory_format=torch.channels_last)
        latents = patchified(vae.encode(pixels).latent_dist.mode()).float()
        return ((latents - mean) / deviation).to(torch.bfloat16).cpu().contiguous()

    return encode
