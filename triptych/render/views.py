"""Pictures of a mesh from cameras: unlit base colour, alpha, normals and depth, and a neutral studio light over them.

Base colour is texture x vertex colour x factor, as in glTF: the product is taken in linear light and returned as sRGB.
Edges are smoothed by supersampling; what is averaged is the covered part of a pixel, so colours stay straight (not
premultiplied) and no background leaks into them. Every surface is opaque and two-sided: alpha in textures, vertex
colours and factors is ignored, and a normal that points away from the viewer is flipped.

Not covered: mipmaps (textures are sampled at the supersampled resolution), metallic-roughness and normal maps, shadows.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..errors import TriptychError
from ..geometry.cameras import Camera
from ..geometry.mesh import Material, Mesh
from .rasterize import Fragments, rasterize

PIXELS_PER_BATCH = 1 << 22  # supersampled pixels drawn at once: bounds memory to a few hundred MB
CLAY = (0.72, 0.70, 0.67)  # sRGB
NORMAL_CHOICES = ("auto", "face", "vertex")
RENDER_MODES = ("shaded", "albedo", "clay", "normal", "depth")


@dataclass(frozen=True)
class RenderedViews:
    """B pictures of side S, float32, row 0 at the top.

    albedo: (B, 3, S, S) sRGB 0-1, unlit base colour, 0 where alpha is 0.
    alpha: (B, 1, S, S) covered share of the pixel, 0-1.
    normal: (B, 3, S, S) unit, world frame, towards the viewer; 0 where alpha is 0.
    depth: (B, 1, S, S) nearest distance along the view axis, world units; inf where alpha is 0.
    """

    albedo: Tensor
    alpha: Tensor
    normal: Tensor
    depth: Tensor


def srgb_to_linear(srgb: Tensor) -> Tensor:
    """sRGB 0-1 -> linear 0-1 (IEC 61966-2-1)."""
    return torch.where(srgb <= 0.04045, srgb / 12.92, ((srgb.clamp_min(0.04045) + 0.055) / 1.055) ** 2.4)


def linear_to_srgb(linear: Tensor) -> Tensor:
    """Linear 0-1 -> sRGB 0-1 (IEC 61966-2-1)."""
    return torch.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear.clamp_min(0.0031308) ** (1 / 2.4) - 0.055)


def render_views(
    mesh: Mesh,
    cameras: Sequence[Camera],
    size: int,
    *,
    supersample: int = 2,
    device: torch.device | str = "cpu",
    normals: str = "auto",
    backend: str = "auto",
) -> RenderedViews:
    """Draw the mesh, which should lie around the origin, from every camera (orthographic and perspective may mix).

    size: side of the square pictures, pixels. supersample: samples per pixel along a side, 1 or more.
    normals: "auto" (stored vertex normals, else flat faces), "face" or "vertex" (computed when none are stored).
    Raises TriptychError for a choice that does not exist and for sizes below 1.
    """
    if normals not in NORMAL_CHOICES:
        raise TriptychError(f"unknown normals {normals!r}: choose one of {', '.join(NORMAL_CHOICES)}")
    if size < 1 or supersample < 1 or not cameras:
        raise TriptychError(
            f"a render needs a size and supersample of 1 or more and a camera, got {size=}, {supersample=} and "
            f"{len(cameras)} cameras"
        )
    side = size * supersample
    surface = _Surface(mesh, torch.device(device), normals)
    per_batch = max(1, PIXELS_PER_BATCH // (side * side))
    parts = []
    for start in range(0, len(cameras), per_batch):
        clip = torch.stack([camera.clip(surface.vertices) for camera in cameras[start : start + per_batch]])
        fragments = rasterize(clip, surface.faces, side, side, backend=backend)
        parts.append(_resolve(surface, clip, fragments, supersample))
    return RenderedViews(*(torch.cat(channel) for channel in zip(*parts, strict=True)))


def _resolve(surface: _Surface, clip: Tensor, fragments: Fragments, supersample: int) -> tuple[Tensor, ...]:
    """Shade the covered samples and average them into pixels: albedo, alpha, normal, depth."""
    batch, side, _ = fragments.triangle_id.shape
    pixel, face = fragments.covered, fragments.covered_ids
    weights = fragments.barycentrics.view(-1, 3).index_select(0, pixel)
    samples = torch.cat(
        [
            surface.albedo(face, weights),
            surface.normal(face, weights, pixel // (side * side), clip),
            torch.ones_like(weights[:, :1]),
        ],
        dim=1,
    )
    image = samples.new_zeros(batch * side * side, 7).index_copy_(0, pixel, samples)
    size = side // supersample
    mean = _blocks(image, batch, size, supersample, torch.add) / supersample**2
    mean = mean.permute(0, 3, 1, 2)
    alpha = mean[:, 6:]
    albedo = (mean[:, :3] / alpha.clamp_min(1e-6)).clamp(0, 1)
    normal = mean[:, 3:6]
    normal = normal / normal.norm(dim=1, keepdim=True).clamp_min(1e-6)
    depth = _blocks(fragments.depth.view(-1, 1), batch, size, supersample, torch.minimum)
    return albedo, alpha.contiguous(), normal, depth.permute(0, 3, 1, 2)


def _blocks(samples: Tensor, batch: int, size: int, block: int, join: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Samples (batch * (size * block)^2, C) joined over block x block pixels: (batch, size, size, C)."""
    # Whole rows first, by slices: several times faster than one reduction over two dimensions.
    rows = samples.view(batch * size, block, -1)
    rows = functools.reduce(join, rows.unbind(1))
    columns = rows.view(batch, size, size, block, -1)
    return functools.reduce(join, columns.unbind(3))


class _Surface:
    """A mesh as tensors on one device: what a sample needs to know by its face and barycentrics."""

    def __init__(self, mesh: Mesh, device: torch.device, normals: str) -> None:
        self.vertices = _tensor(mesh.vertices, torch.float32, device)
        self.faces = _tensor(mesh.faces, torch.int64, device)
        self.face_normals = _tensor(mesh.face_normals(), torch.float32, device)
        smooth = normals == "vertex" or (normals == "auto" and mesh.normals is not None)
        self.corner_normals = None
        if smooth:
            vertex_normals = _tensor(mesh.vertex_normals(), torch.float32, device)
            self.corner_normals = vertex_normals[self.faces]
        materials = mesh.materials or (Material(),)
        self.face_materials = None
        if mesh.face_materials is not None and len(materials) > 1:
            self.face_materials = _tensor(mesh.face_materials, torch.int64, device)
        corner_uv = mesh.corner_uv()
        self.corner_uv = None
        if corner_uv is not None and any(material.base_color_texture is not None for material in materials):
            self.corner_uv = _tensor(corner_uv, torch.float32, device)
        self.texels, self.texture_sizes = _texel_table(materials, self.corner_uv is not None, device)
        self.corner_colors = None
        if mesh.colors is not None:
            colors = _tensor(mesh.colors[:, :3], torch.float32, device)
            self.corner_colors = srgb_to_linear(colors.clamp(0, 1))[self.faces]

    def albedo(self, face: Tensor, weights: Tensor) -> Tensor:
        """(N, 3) sRGB."""
        if self.corner_uv is not None:
            base = self._textured(face, weights)
        elif self.face_materials is not None:
            base = self.texels.index_select(0, self.face_materials[face])
        else:
            base = self.texels[:1].expand(len(face), 3)
        if self.corner_colors is None:
            return base
        return linear_to_srgb(srgb_to_linear(base) * _mix(self.corner_colors, face, weights))

    def _textured(self, face: Tensor, weights: Tensor) -> Tensor:
        """Bilinear samples of each face's texture, wrapped; all textures lie in one table of texels."""
        uv = _mix(self.corner_uv, face, weights)  # type: ignore[arg-type]
        if self.face_materials is None:
            first, width, height = self.texture_sizes[0].unbind(0)
        else:
            first, width, height = self.texture_sizes[self.face_materials[face]].unbind(1)
        uv = torch.nan_to_num(uv - uv.floor())
        x, y = uv[:, 0] * width - 0.5, (1 - uv[:, 1]) * height - 0.5
        left, upper = x.floor(), y.floor()
        right_share, lower_share = (x - left)[:, None], (y - upper)[:, None]
        left, upper = left.long(), upper.long()
        columns = left.remainder(width), (left + 1).remainder(width)
        rows = first + upper.remainder(height) * width, first + (upper + 1).remainder(height) * width
        corners = [self.texels.index_select(0, row + column) for row in rows for column in columns]
        above = torch.lerp(corners[0], corners[1], right_share)
        below = torch.lerp(corners[2], corners[3], right_share)
        return torch.lerp(above, below, lower_share)

    def normal(self, face: Tensor, weights: Tensor, image: Tensor, clip: Tensor) -> Tensor:
        """(N, 3) unit normals, towards the viewer of each image."""
        towards = self._towards_viewer(clip)
        index = image * len(self.faces) + face
        if self.corner_normals is None:
            return (self.face_normals[None] * towards).view(-1, 3).index_select(0, index)
        # A face's own corner normals may contradict its winding: the winding decides which side is seen, they follow.
        agree = (self.corner_normals.sum(dim=1) * self.face_normals).sum(dim=1) >= 0
        sign = torch.where(agree[:, None], towards, -towards).view(-1, 1)
        mixed = _mix(self.corner_normals, face, weights)
        return mixed / mixed.norm(dim=1, keepdim=True).clamp_min(1e-12) * sign.index_select(0, index)

    def _towards_viewer(self, clip: Tensor) -> Tensor:
        """(B, F, 1): 1 where the face winds counter-clockwise in the picture, else -1."""
        x, y, w = (clip[..., i][:, self.faces] for i in (0, 1, 3))
        # The determinant of the homogeneous corners is the signed area times the product of their w.
        cross = [y[..., i] * w[..., j] - y[..., j] * w[..., i] for i, j in ((1, 2), (2, 0), (0, 1))]
        determinant = x[..., 0] * cross[0] + x[..., 1] * cross[1] + x[..., 2] * cross[2]
        return torch.where(determinant >= 0, 1.0, -1.0)[..., None]


def _mix(corners_F3C: Tensor, face: Tensor, weights: Tensor) -> Tensor:
    """Corner values at the faces (N,) and barycentrics (N, 3) of samples: (N, C)."""
    return torch.bmm(weights[:, None], corners_F3C.index_select(0, face)).squeeze(1)


def _texel_table(materials: Sequence[Material], textured: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """All base colours as sRGB texels (T, 3), the factor multiplied in, and (M, 3) int64 rows: first texel, width,
    height."""
    tables, sizes, first = [], [], 0
    for material in materials:
        texture = material.base_color_texture if textured else None
        if texture is None:
            texels = torch.ones(1, 3, device=device)
            height = width = 1
        else:
            height, width = texture.shape[:2]
            rgb = texture[..., :3] if texture.ndim == 3 and texture.shape[2] >= 3 else _as_rgb(texture)
            texels = _tensor(rgb, torch.float32, device).reshape(-1, 3) / 255
        factor = torch.tensor(material.base_color[:3], dtype=torch.float32, device=device)
        if not bool((factor == 1).all()):
            texels = linear_to_srgb((srgb_to_linear(texels) * factor).clamp(0, 1))
        tables.append(texels)
        sizes.append((first, width, height))
        first += height * width
    return torch.cat(tables), torch.tensor(sizes, dtype=torch.int64, device=device)


def _tensor(array: np.ndarray, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A copy of a numpy array, which may be read-only or strided."""
    return torch.tensor(np.ascontiguousarray(array), dtype=dtype, device=device)


def _as_rgb(texture: np.ndarray) -> np.ndarray:
    """Grey pictures (H, W), (H, W, 1) or grey with alpha (H, W, 2) as (H, W, 3)."""
    grey = texture if texture.ndim == 2 else texture[..., 0]
    return np.repeat(grey[..., None], 3, axis=2)


def shade(
    rendered: RenderedViews,
    cameras: Sequence[Camera],
    *,
    light_azimuth_deg: float = -35.0,
    light_elevation_deg: float = 50.0,
    key: float = 0.75,
    headlight: float = 0.25,
    ambient: float = 0.35,
    ground: float = 0.5,
    follow_camera: bool = False,
) -> Tensor:
    """Lambert shading in linear light: (B, 4, S, S) float32 RGBA, sRGB, straight alpha.

    light_azimuth_deg, light_elevation_deg: where the key light stands, in the cameras' convention; its azimuth counts
        from each camera with ``follow_camera`` (every picture is lit alike), else from the front (a lamp fixed in the
        world).
    key, headlight: intensities of the key light and of a light at the camera. ambient: from straight above; ``ground``
        is the share of it that arrives from straight below.
    """
    lit = []
    for i, camera in enumerate(cameras):
        normal = rendered.normal[i]
        _, rays = camera.rays(normal.shape[-1])
        towards_camera = -rays.to(normal).permute(2, 0, 1)
        azimuth = math.radians(light_azimuth_deg + (camera.azimuth_deg if follow_camera else 0.0))
        elevation = math.radians(light_elevation_deg)
        lamp = normal.new_tensor(
            [math.sin(azimuth) * math.cos(elevation), math.sin(elevation), math.cos(azimuth) * math.cos(elevation)]
        )
        above = 0.5 + 0.5 * normal[1]
        light = ambient * (ground + (1 - ground) * above)
        light = light + headlight * (normal * towards_camera).sum(dim=0).clamp_min(0)
        lit.append(light + key * (normal * lamp[:, None, None]).sum(dim=0).clamp_min(0))
    linear = srgb_to_linear(rendered.albedo) * torch.stack(lit)[:, None]
    color = linear_to_srgb(linear.clamp(0, 1)) * (rendered.alpha > 0)
    return torch.cat([color, rendered.alpha], dim=1)


def render_mesh(
    mesh: Mesh,
    cameras: Sequence[Camera],
    size: int,
    mode: str = "shaded",
    *,
    supersample: int = 2,
    device: torch.device | str = "cpu",
    normals: str = "auto",
    follow_camera: bool = False,
) -> Tensor:
    """One picture per camera, (B, 4, size, size) float32 RGBA sRGB, straight alpha.

    mode: "shaded", "albedo" (unlit), "clay" (one material, lit), "normal" (camera frame, as colours) or "depth"
        (nearest is white, farthest of all the pictures is dark).
    Raises TriptychError for an unknown mode, and as ``render_views`` does.
    """
    _check_mode(mode)
    rendered = render_views(mesh, cameras, size, supersample=supersample, device=device, normals=normals)
    return picture(rendered, cameras, mode, follow_camera=follow_camera)


def _check_mode(mode: str) -> None:
    if mode not in RENDER_MODES:
        raise TriptychError(f"unknown render mode {mode!r}: choose one of {', '.join(RENDER_MODES)}")


def picture(rendered: RenderedViews, cameras: Sequence[Camera], mode: str, *, follow_camera: bool = False) -> Tensor:
    """``render_mesh`` for views that are rendered already: (B, 4, S, S)."""
    _check_mode(mode)
    if mode == "shaded":
        return shade(rendered, cameras, follow_camera=follow_camera)
    if mode == "clay":
        return shade(as_clay(rendered), cameras, follow_camera=follow_camera)
    if mode == "normal":
        turn = torch.stack([camera.rotation() for camera in cameras]).to(rendered.normal)
        color = torch.einsum("bij,bjhw->bihw", turn, rendered.normal) * 0.5 + 0.5
    elif mode == "depth":
        color = _depth_as_grey(rendered.depth)
    else:
        color = rendered.albedo
    return torch.cat([color * (rendered.alpha > 0), rendered.alpha], dim=1)


def as_clay(rendered: RenderedViews) -> RenderedViews:
    """The same views in one matt grey material."""
    clay = rendered.albedo.new_tensor(CLAY)[None, :, None, None].expand_as(rendered.albedo)
    return RenderedViews(clay * (rendered.alpha > 0), rendered.alpha, rendered.normal, rendered.depth)


def _depth_as_grey(depth: Tensor) -> Tensor:
    seen = depth[torch.isfinite(depth)]
    if seen.numel() == 0:
        return torch.zeros_like(depth).expand(-1, 3, -1, -1)
    near, far = seen.min(), seen.max()
    grey = 1 - 0.85 * (depth - near) / (far - near).clamp_min(1e-6)
    return grey.clamp(0, 1).expand(-1, 3, -1, -1)
