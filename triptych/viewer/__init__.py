"""A self-contained page that shows meshes: one HTML file, our own WebGL2 viewer, no network."""

from .export import write_viewer

__all__ = ["write_viewer"]
