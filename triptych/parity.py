"""Run a reference file and compare: inputs, weights and outputs of an original implementation against this one.

A file is a safetensors file with `weights/<key>`, `input/<name>` and `output/<name>`, and metadata strings `class`,
`config` (constructor arguments), `run` (settings), `tolerance` (output -> largest absolute error; 0 means equality) and
`seed`. `RUNNERS` says which code answers for which class. Weights may lie in a file of the same class, config and seed
beside it. Everything is computed in float32 on the CPU; half-precision weights are raised first.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .errors import TriptychError
from .sampling.flow_euler import FlowSamples, cycle_conditions, flow_euler_sample, multidiffusion
from .sparse.tensor import SparseTensor


@dataclass(frozen=True)
class Case:
    """One reference file. tolerance: 0.0 for equality."""

    path: Path
    class_name: str
    weights: dict[str, Tensor]
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    config: dict[str, Any]
    run: dict[str, Any]
    tolerance: dict[str, float]
    seed: str

    def network(self, module: nn.Module) -> nn.Module:
        """The module with the file's weights in eval mode, float32."""
        module.load_state_dict({name: _float32(value) for name, value in self.weights.items()}, strict=True)
        return module.eval().requires_grad_(False)

    def sparse(self, name: str = "feats", resolution: int | None = None) -> SparseTensor:
        return SparseTensor(self.inputs[name], self.inputs["coords"], resolution=resolution)


@dataclass(frozen=True)
class Comparison:
    """error: the largest absolute difference of one output, infinite where shapes or kinds differ. note: says which."""

    name: str
    error: float
    tolerance: float
    note: str = ""

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance


# Among the outputs, but chosen by the file's author: the rows of a large result that the file holds.
GIVEN = frozenset({"rows"})

Results = dict[str, Tensor]
Runner = Callable[[Case], Results]


def read_case(path: Path) -> Case:
    """Raises TriptychError when the file is missing, not of the layout, or without its weights."""
    groups, metadata = _read(path)
    given = {name: groups["output"].pop(name) for name in GIVEN & set(groups.get("output", {}))}
    try:
        case = Case(
            path=path,
            class_name=metadata["class"],
            weights=groups.get("weights", {}),
            inputs=groups.get("input", {}) | given,
            outputs=groups["output"],
            config=dict(json.loads(metadata.get("config", "{}"))),
            run=dict(json.loads(metadata.get("run", "{}"))),
            tolerance={k: float(v) for k, v in json.loads(metadata["tolerance"]).items()},
            seed=metadata.get("seed", ""),
        )
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        what = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise TriptychError(f"{path} is no reference file ({what}): see triptych/parity.py for the layout") from error
    missing = sorted(set(case.outputs) - set(case.tolerance))
    if missing:
        raise TriptychError(f"{path} gives no tolerance for {', '.join(missing)}: add it to the metadata")
    return case


def run_case(case: Case) -> Results:
    """What this library computes for the file. Raises TriptychError where no runner, or no config or tensor fits."""
    if case.class_name not in RUNNERS:
        raise TriptychError(f"{case.path} is of {case.class_name!r}, known are {', '.join(RUNNERS)}")
    try:
        with torch.no_grad():
            return RUNNERS[case.class_name](case)
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        if isinstance(error, TriptychError):
            raise
        what = f"it has no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())[:300]
        raise TriptychError(f"{case.path} does not fit {case.class_name}: {what}") from error


def compare(case: Case, results: Mapping[str, Tensor]) -> list[Comparison]:
    """One entry for each output of the file, in the file's order of names."""
    return [
        _compare_one(name, results.get(name), case.outputs[name], case.tolerance[name]) for name in sorted(case.outputs)
    ]


def _compare_one(name: str, actual: Tensor | None, expected: Tensor, tolerance: float) -> Comparison:
    if actual is None:
        return Comparison(name, torch.inf, tolerance, "not computed")
    if actual.shape != expected.shape:
        return Comparison(name, torch.inf, tolerance, f"shape {list(actual.shape)} instead of {list(expected.shape)}")
    if actual.is_floating_point() != expected.is_floating_point():
        return Comparison(name, torch.inf, tolerance, f"{actual.dtype} instead of {expected.dtype}")
    if not actual.numel():
        return Comparison(name, 0.0, tolerance)
    error = float((actual.double() - expected.double()).abs().max())
    return Comparison(name, torch.inf if error != error else error, tolerance, "NaN" if error != error else "")


def _read(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, str]]:
    groups: dict[str, dict[str, Tensor]] = {}
    if not path.is_file():
        raise TriptychError(f"{path} is no file: name a reference file (.safetensors)")
    try:
        with safe_open(str(path), framework="pt") as file:
            for key in file.keys():  # noqa: SIM118  (safe_open is no dict)
                group, _, name = key.partition("/")
                groups.setdefault(group, {})[name] = file.get_tensor(key)
            return groups, dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise TriptychError(f"{path} is not a whole safetensors file ({error}): fetch it again") from error


def _with_weights(case: Case) -> Case:
    """The case, its weights taken from the file beside it that has the same network."""
    if case.weights:
        return case
    for path in sorted(set(case.path.parent.glob("*.safetensors")) - {case.path}):
        try:
            other = read_case(path)
        except TriptychError:  # what else lies in the folder is not asked for
            continue
        if other.weights and (other.class_name, other.config, other.seed) == (case.class_name, case.config, case.seed):
            return replace(case, weights=other.weights)
    raise TriptychError(f"{case.path} has no weights, and no file beside it has its {case.class_name}: put it there")


def _float32(value: Tensor) -> Tensor:
    return value.float() if value.is_floating_point() else value


def _int32(value: Tensor) -> Tensor:
    return value.to(torch.int32)


def _build(case: Case) -> nn.Module:
    from .bundles.components import build_component

    return case.network(build_component(case.class_name, case.config))


# ---- stage 1


def _structure_encoder(case: Case) -> Results:
    model = _build(case)
    z, mean, logvar = model(case.inputs["x"], return_raw=True)
    sampled = model(case.inputs["x"], sample_posterior=True, eps=case.inputs["eps"])
    return {"z": z, "mean": mean, "logvar": logvar, "z_sampled": sampled}


def _structure_decoder(case: Case) -> Results:
    from .models.structure_vae import occupied_coords

    logits = _build(case)(case.inputs["z"])
    return {"logits": logits, "coords": occupied_coords(logits)}


def _structure_flow(case: Case) -> Results:
    """One forward pass, one sampling, or the sampling modes for several pictures: the outputs say which."""
    model = _build(case)
    if not case.run:
        return {"v": model(case.inputs["x"], case.inputs["t"], case.inputs["cond"])}
    if not any("/" in name for name in case.outputs):
        return _trajectory(_sample(case, model, case.inputs["noise"], case.inputs["cond"]))
    conditions = list(case.inputs["cond"].split(1))
    modes = {
        "stochastic": _sample(case, model, case.inputs["noise"], cycle_conditions(conditions)),
        "multidiffusion": _sample(case, multidiffusion(model), case.inputs["noise"], conditions),
    }
    return {f"{mode}/{name}": value for mode, made in modes.items() for name, value in _trajectory(made).items()}


def _sample(case: Case, model: Callable[..., Any], noise: Any, cond: Any) -> FlowSamples:
    if case.run["sampler"] != "FlowEulerGuidanceIntervalSampler":
        raise TriptychError(f"{case.path} asks for the sampler {case.run['sampler']!r}, which is not known")
    return flow_euler_sample(
        model,
        noise,
        steps=case.run["steps"],
        guidance=case.run["cfg_strength"],
        guidance_interval=tuple(case.run["cfg_interval"]),
        rescale_t=case.run["rescale_t"],
        sigma_min=case.run["sigma_min"],
        cond=cond,
        neg_cond=case.inputs["neg_cond"],
        keep_trajectory=True,
    )


def _trajectory(made: FlowSamples) -> Results:
    """samples, and each step's tensors stacked."""
    stacked = {name: torch.stack([_feats(x) for x in getattr(made, name)]) for name in ("pred_x_t", "pred_x_0", "v")}
    return {"samples": _feats(made.samples), **stacked}


def _feats(x: Any) -> Tensor:
    return x.feats if isinstance(x, SparseTensor) else x


# ---- stage 2


def _slat_encoder(case: Case) -> Results:
    model, x = _build(case), case.sparse(resolution=case.config["resolution"])
    z, mean, logvar = model(x, return_raw=True)
    sampled = model(x, sample_posterior=True, eps=case.inputs["eps"])
    return {"coords": z.coords, "z": z.feats, "mean": mean, "logvar": logvar, "z_sampled": sampled.feats}


def _slat_flow(case: Case) -> Results:
    from .sampling.slat import denormalize_slat

    model, x = _build(case), case.sparse("x_feats", case.config["resolution"])
    velocity = model(x, case.inputs["t"], case.inputs["cond"])
    made = _sample(case, model, x.replace(case.inputs["noise_feats"]), case.inputs["cond"])
    slat = denormalize_slat(made.samples, case.run["slat_mean"], case.run["slat_std"])
    sampling = {f"sampling/{name}": value for name, value in (_trajectory(made) | {"slat": slat.feats}).items()}
    return {"coords": velocity.coords, "forward_v": velocity.feats, **sampling}


def _slat_mesh_decoder(case: Case) -> Results:
    """Raw features at sampled rows and their statistics, or the meshes: the outputs say which."""
    raw = _build(_with_weights(case))(case.sparse(resolution=case.config["resolution"]))
    if "feats_rows" not in case.outputs:
        return _meshes(raw)
    rows = case.inputs["rows"].long()
    deviation, mean = torch.std_mean(raw.feats.double(), dim=0, correction=0)
    return {
        "n_rows": torch.tensor([len(raw)], dtype=torch.int32),
        "coords_rows": raw.coords[rows],
        "feats_rows": raw.feats[rows],
        "channel_mean": mean.float(),
        "channel_std": deviation.float(),
        "channel_absmax": raw.feats.abs().amax(dim=0),
    }


def _meshes(raw: SparseTensor) -> Results:
    from .geometry.flexicubes import features_to_mesh

    results: Results = {}
    for index in range(raw.batch_size):
        sample = raw.sample(index)
        mesh = features_to_mesh(sample.coords[:, 1:], sample.feats, cast(int, raw.resolution))
        named = {"vertices": mesh.vertices, "faces": _int32(mesh.faces), "vertex_attrs": mesh.vertex_attrs}
        results |= {f"{index}/{name}": value for name, value in named.items() if value is not None}
    return results


def _mesh_extraction(case: Case) -> Results:
    from .geometry.flexicubes import features_to_mesh

    feats = case.inputs["feats"] if case.config["use_color"] else case.inputs["feats"][:, :53]
    coords = case.inputs["coords"][:, -3:]
    results: Results = {}
    for mode in ("eval", "train"):
        mesh = features_to_mesh(coords, feats, case.config["res"], training=mode == "train")
        named = {name: value for name, value in vars(mesh).items() if value is not None}
        named["faces"] = _int32(mesh.faces)
        if "reg_loss" in named:
            named["reg_loss"] = named["reg_loss"].reshape(1)
        results |= {f"{mode}/{name}": value for name, value in named.items()}
    return results


def _flexicubes(case: Case) -> Results:
    from .geometry.flexicubes import flexicubes_dense

    x = case.inputs
    results: Results = {}
    for mode in ("eval", "train"):
        mesh = flexicubes_dense(
            x["voxelgrid_vertices"], x["scalar_field"], x["beta"], x["alpha"], x["gamma_f"], case.run["resolution"],
            x["colors"], training=mode == "train",
        )  # fmt: skip
        named = {"vertices": mesh.vertices, "faces": _int32(mesh.faces), "colors": mesh.colours}
        results |= {f"{mode}/{name}": value for name, value in named.items() if value is not None}
        results["L_dev"] = mesh.deviation
    return results


def _slat_gaussian_decoder(case: Case) -> Results:
    model = _build(case)
    raw = model(case.sparse(resolution=case.config["resolution"]))
    samples = cast(Any, model).gaussians(raw)
    named = {f"{index}/{name}": value for index, made in enumerate(samples) for name, value in vars(made).items()}
    return {"feats": raw.feats, **named}


def _voxel_features(case: Case) -> Results:
    from .models.voxel_features import mean_patch_features, opencv_cameras, project_points, voxel_centres

    x, run = case.inputs, case.run
    cameras = x["transform_matrix"], x["camera_angle_x"]
    extrinsics, intrinsics = opencv_cameras(*cameras)
    features = mean_patch_features(x["coords"], x["tokens"], *cameras, run["resolution"], run["prefix_tokens"])
    return {
        "extrinsics": extrinsics,
        "intrinsics": intrinsics,
        "uv": project_points(voxel_centres(x["coords"], run["resolution"]), extrinsics, intrinsics),
        "features": features,
        "features_f16": features.half(),
    }


# ---- single operators


def _transformer_block(case: Case) -> Results:
    from .models.blocks import ModulatedTransformerCrossBlock

    return {"x": case.network(ModulatedTransformerCrossBlock(**case.config))(**case.inputs)}


def _embeddings(case: Case) -> Results:
    from .models.blocks import AbsolutePositionEmbedder, TimestepEmbedder

    tables = {f"ape{n}": AbsolutePositionEmbedder(n)(case.inputs["coords"]) for n in case.run["ape_channels"]}
    return tables | {"t_freq": TimestepEmbedder.timestep_embedding(case.inputs["t"], case.run["t_dim"])}


def _rms_norm(case: Case) -> Results:
    from .models.blocks import MultiHeadRMSNorm

    return {"x": case.network(MultiHeadRMSNorm(**case.config))(case.inputs["x"])}


def _reindexing(case: Case) -> Results:
    from .models.structure_flow import patchify, unpatchify
    from .models.structure_vae import pixel_shuffle_3d

    x, patch = case.inputs["x"], case.run["patch"]
    shuffled = pixel_shuffle_3d(x, case.run["factor"])
    return {"shuffled": shuffled, "patched": patchify(x, patch), "unpatched": unpatchify(x, patch)}


def _sparse_attention(case: Case) -> Results:
    from .sparse.attention import cross_attention, full_attention

    x = case.sparse("qkv")
    return {
        "self_out": full_attention(case.inputs["qkv"], x),
        "cross_out": cross_attention(case.inputs["q"], case.inputs["kv"], x),
    }


def _window_attention(case: Case) -> Results:
    from .sparse.attention import window_partition, windowed_attention

    x, size = case.sparse("qkv"), case.run["window_size"]
    results: Results = {}
    for shift in case.run["shifts"]:
        windows = window_partition(x, size, shift)
        lengths = torch.tensor(windows.lengths)
        group = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
        first = torch.full((len(lengths),), len(x)).scatter_reduce(0, group, windows.order.long(), "amin")
        results[f"shift{shift}/group"] = _int32(first[group][windows.inverse])
        results[f"shift{shift}/seq_lens"] = _int32(lengths.sort().values)
        results[f"shift{shift}/out"] = windowed_attention(case.inputs["qkv"], x, size, shift)
    return results


def _resampling(case: Case) -> Results:
    from .sparse.spatial import SparseDownsample, SparseUpsample

    down = SparseDownsample(case.run["factor"])(case.sparse())
    up = SparseUpsample(case.run["factor"])(down)
    return {"down_coords": down.coords, "down_feats": down.feats, "up_coords": up.coords, "up_feats": up.feats}


def _group_norm(case: Case) -> Results:
    from .sparse.norm import SparseGroupNorm32

    return _rows(case.network(SparseGroupNorm32(**case.config))(case.sparse()))


def _res_blocks(case: Case) -> Results:
    from .models.sparse_blocks import SparseResBlock3d

    outer, emb, inner = (case.config[name] for name in ("channels", "emb_channels", "mid_channels"))
    blocks = nn.ModuleDict({
        "down": SparseResBlock3d(outer, emb, inner, downsample=True),
        "up": SparseResBlock3d(inner, emb, outer, upsample=True),
        "flat": SparseResBlock3d(outer, emb),
    })  # fmt: skip
    case.network(blocks)
    down = blocks["down"](case.sparse(), case.inputs["emb"])
    up = blocks["up"](down, case.inputs["emb"])
    flat = blocks["flat"](up, case.inputs["emb"])
    return {"down_coords": down.coords, "down_feats": down.feats, "up_feats": up.feats, "flat_feats": flat.feats}


def _subdivision(case: Case) -> Results:
    from .sparse.spatial import SparseSubdivide

    return _rows(SparseSubdivide()(case.sparse()))


def _subdivide_block(case: Case) -> Results:
    from .models.sparse_blocks import SparseSubdivideBlock3d

    return _rows(case.network(SparseSubdivideBlock3d(**case.config))(case.sparse(resolution=case.config["resolution"])))


def _sparse_conv(case: Case) -> Results:
    from .sparse.conv import SparseConv3d

    weights = {name if name.startswith("conv.") else f"conv.{name}": value for name, value in case.weights.items()}
    module = replace(case, weights=weights).network(SparseConv3d(**case.config))
    return _rows(module(case.sparse()))


def _sparse_transformer_block(case: Case) -> Results:
    from .models.sparse_blocks import SparseTransformerBlock

    return _rows(case.network(SparseTransformerBlock(**case.config))(case.sparse()))


def _rows(x: SparseTensor) -> Results:
    return {"coords": x.coords, "feats": x.feats}


RUNNERS: dict[str, Runner] = {
    "SparseStructureEncoder": _structure_encoder,
    "SparseStructureDecoder": _structure_decoder,
    "SparseStructureFlowModel": _structure_flow,
    "SLatEncoder": _slat_encoder,
    "SLatFlowModel": _slat_flow,
    "SLatMeshDecoder": _slat_mesh_decoder,
    "SLatGaussianDecoder": _slat_gaussian_decoder,
    "SparseFeatures2Mesh": _mesh_extraction,
    "FlexiCubes": _flexicubes,
    "dataset_toolkits/extract_feature": _voxel_features,
    "ModulatedTransformerCrossBlock": _transformer_block,
    "AbsolutePositionEmbedder + TimestepEmbedder.timestep_embedding": _embeddings,
    "MultiHeadRMSNorm": _rms_norm,
    "pixel_shuffle_3d, patchify, unpatchify": _reindexing,
    "sparse_scaled_dot_product_attention": _sparse_attention,
    "calc_window_partition + sparse_windowed_scaled_dot_product_self_attention": _window_attention,
    "SparseDownsample + SparseUpsample": _resampling,
    "SparseGroupNorm32": _group_norm,
    "SparseResBlock3d": _res_blocks,
    "SparseSubdivide": _subdivision,
    "SparseSubdivideBlock3d": _subdivide_block,
    "SparseConv3d": _sparse_conv,
    "SparseTransformerBlock": _sparse_transformer_block,
}
