"""Image features on voxels: what the published latent encoder reads (TRELLIS, arXiv 2412.01506, data toolkit).

Every occupied voxel is projected into each of many rendered views, the patch features of the view (DINOv2) are sampled
there bilinearly, and the mean over all views is the voxel's feature. Occlusion is ignored, and a view that does not
show the voxel counts as zeros, as published.

Cameras are given in the Blender convention: camera-to-world matrices, the camera looks along its -Z and its +Y is up.
They are used in the OpenCV convention (+Z ahead, +Y down). Space is z-up, the grid fills [-0.5, 0.5]^3.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import TriptychError


def opencv_cameras(camera_to_world: Tensor, fov_x: Tensor) -> tuple[Tensor, Tensor]:
    """Extrinsics (V, 4, 4) world-to-camera and intrinsics (V, 3, 3) of square pictures, in the OpenCV convention.

    camera_to_world: (V, 4, 4) in the Blender convention. fov_x: (V,) full field of view in radians. The intrinsics map
    to the unit square, (0, 0) its upper left corner. Computed in float64, returned in the dtype of camera_to_world.
    """
    flip = torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=torch.float64, device=camera_to_world.device)
    extrinsics = torch.linalg.inv(camera_to_world.double() * flip)
    focal = 0.5 / torch.tan(fov_x.double() / 2)
    intrinsics = torch.eye(3, dtype=torch.float64, device=fov_x.device).repeat(len(fov_x), 1, 1)
    intrinsics[:, 0, 0] = intrinsics[:, 1, 1] = focal
    intrinsics[:, :2, 2] = 0.5
    return extrinsics.to(camera_to_world.dtype), intrinsics.to(camera_to_world.dtype)


def project_points(points: Tensor, extrinsics: Tensor, intrinsics: Tensor) -> Tensor:
    """World points (N, 3) -> (V, N, 2) positions in the pictures' unit square; outside of it they are not visible.

    Points must lie in front of the cameras; one behind is mirrored into the picture.
    """
    camera = points @ extrinsics[:, :3, :3].mT + extrinsics[:, None, :3, 3]
    image = camera @ intrinsics.mT
    return image[..., :2] / image[..., 2:]


def voxel_centres(coords: Tensor, resolution: int) -> Tensor:
    """(N, 3) integer coordinates -> (N, 3) float32 centres in [-0.5, 0.5]^3."""
    return (coords.float() + 0.5) / resolution - 0.5


def mean_patch_features(
    coords: Tensor,
    tokens: Iterable[Tensor],
    camera_to_world: Tensor,
    fov_x: Tensor,
    resolution: int = 64,
    prefix_tokens: int = 5,
) -> Tensor:
    """Features (N, C) float32 of the voxels coords (N, 3): the mean over the views of what lies at their projections.

    tokens: for each view (prefix_tokens + P * P, C), the class and register tokens first, then patches row by row; a
    tensor (V, tokens, C), or anything that yields one view at a time, since 150 views of 1024 channels are 800 MB.
    Cameras as in `opencv_cameras`. Raises TriptychError where views and cameras disagree or the patches are no square.
    """
    uv_VN2 = project_points(voxel_centres(coords, resolution), *opencv_cameras(camera_to_world, fov_x))
    total, views = None, 0
    for view in tokens:
        if views == len(uv_VN2):
            raise TriptychError(f"there are more views than the {len(uv_VN2)} cameras: give one camera for each view")
        sampled = _sample_patches(view[prefix_tokens:].float(), uv_VN2[views])
        total = sampled if total is None else total + sampled
        views += 1
    if total is None or views != len(uv_VN2):
        raise TriptychError(f"{views} views for {len(uv_VN2)} cameras: give one camera for each view")
    return total / views


def _sample_patches(patches: Tensor, uv: Tensor) -> Tensor:
    """(P * P, C) at (N, 2) of the unit square -> (N, C); beyond the border the features fade to zero."""
    side = math.isqrt(len(patches))
    if side * side != len(patches) or not side:
        raise TriptychError(f"{len(patches)} patch tokens do not fill a square: check prefix_tokens")
    grid = patches.T.reshape(1, -1, side, side)
    return F.grid_sample(grid, (2 * uv - 1)[None, None], align_corners=False)[0, :, 0].T
