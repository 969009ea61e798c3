"""Cameras and the view rig.

World frame: right-handed, +Y up, the object faces +Z. A camera at azimuth ``a`` and elevation ``e`` stands at
``r (sin a cos e, sin e, cos a cos e)`` and looks at the origin: azimuth 0 shows the front, 90 the subject's *left*
side, 180 the back, 270 the subject's right side.

Camera frame: +x right in the picture, +y up in the picture, +z towards the viewer, so ``depth = radius - z``.
NDC: x right, y up, both in [-1, 1] inside the frame. Picture rows run downwards, so pixel ``(row, column)`` of an
``S x S`` picture has its centre at NDC ``(2 (column + .5) / S - 1, 1 - 2 (row + .5) / S)``, and a sampling grid for
``torch.nn.functional.grid_sample(align_corners=False)`` is ``(ndc_x, -ndc_y)``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

VIEW_NAMES = ("front", "left", "back", "right")
VIEW_AZIMUTHS_DEG = (0.0, 90.0, 180.0, 270.0)
FRAME_FILL = 0.85  # the object's longest side over the frame's side
RIG_HALF_EXTENT = 0.5 / FRAME_FILL  # half of the frame's side in world units


@dataclass(frozen=True)
class Camera:
    """One camera that looks at the origin.

    azimuth_deg, elevation_deg: degrees, see the module's frame; elevation in (-90, 90).
    radius: distance from the origin, world units.
    half_extent: half side of the orthographic frame, world units; ``None`` for a perspective camera.
    fov_deg: full field of view of a perspective camera (square frame); ``None`` for an orthographic one.
    """

    azimuth_deg: float = 0.0
    elevation_deg: float = 0.0
    radius: float = 2.0
    half_extent: float | None = RIG_HALF_EXTENT
    fov_deg: float | None = None

    def __post_init__(self) -> None:
        if (self.half_extent is None) == (self.fov_deg is None):
            raise ValueError(f"a camera has either half_extent or fov_deg, got {self.half_extent=} and {self.fov_deg=}")
        if not -90 < self.elevation_deg < 90:
            raise ValueError(f"elevation_deg must lie in (-90, 90), got {self.elevation_deg}")

    @property
    def is_orthographic(self) -> bool:
        return self.fov_deg is None

    @property
    def _tangent(self) -> float:
        """Half of a perspective frame's side at depth 1."""
        return math.tan(math.radians(self.fov_deg or 0.0) / 2)

    def position(self) -> torch.Tensor:
        """Camera centre in the world, (3,) float32."""
        return self.radius * self.rotation()[2]

    def rotation(self) -> torch.Tensor:
        """(3, 3) float32; rows are the camera's right, up and backward axes in the world."""
        azimuth, elevation = math.radians(self.azimuth_deg), math.radians(self.elevation_deg)
        sin_a, cos_a, sin_e, cos_e = math.sin(azimuth), math.cos(azimuth), math.sin(elevation), math.cos(elevation)
        return torch.tensor(
            [[cos_a, 0.0, -sin_a], [-sin_a * sin_e, cos_e, -cos_a * sin_e], [sin_a * cos_e, sin_e, cos_a * cos_e]],
            dtype=torch.float32,
        )

    def project(self, points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """World points (..., 3) -> NDC (..., 2) and depth (...), the distance along the view axis, positive ahead."""
        camera = points @ self.rotation().to(points).T
        depth = self.radius - camera[..., 2]
        if self.half_extent is not None:
            return camera[..., :2] / self.half_extent, depth
        scale = depth * self._tangent
        return camera[..., :2] / scale[..., None], depth

    def clip(self, points: torch.Tensor) -> torch.Tensor:
        """World points (..., 3) -> clip coordinates (..., 4): NDC times w, depth times w, and w (1 if orthographic)."""
        ndc, depth = self.project(points)
        w = torch.ones_like(depth) if self.is_orthographic else depth
        return torch.cat([ndc * w[..., None], (depth * w)[..., None], w[..., None]], dim=-1)

    def rays(self, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Origins and unit directions in the world, each (size, size, 3) float32, through the pixel centres.

        A point at distance ``t`` along an orthographic ray has depth ``t``.
        """
        centres = (torch.arange(size, dtype=torch.float32) + 0.5) * (2 / size) - 1
        y, x = torch.meshgrid(-centres, centres, indexing="ij")
        right, up, backward = self.rotation()
        if self.half_extent is not None:
            origins = self.position() + self.half_extent * (x[..., None] * right + y[..., None] * up)
            return origins, (-backward).expand_as(origins).clone()
        directions = -backward + self._tangent * (x[..., None] * right + y[..., None] * up)
        return self.position().expand_as(directions).clone(), torch.nn.functional.normalize(directions, dim=-1)


def rig_cameras(azimuths_deg: tuple[float, ...] = VIEW_AZIMUTHS_DEG) -> list[Camera]:
    """The orthographic view rig: elevation 0, the frame 1 / 0.85 of the cube's side."""
    return [Camera(azimuth_deg=azimuth) for azimuth in azimuths_deg]


def turntable_cameras(count: int, elevation_deg: float = 15.0) -> list[Camera]:
    """``count`` orthographic cameras at even azimuths, first the front."""
    return [Camera(azimuth_deg=360.0 * i / count, elevation_deg=elevation_deg, half_extent=0.75) for i in range(count)]
