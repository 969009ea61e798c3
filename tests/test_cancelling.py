"""Long work says how far it is and stops when it is told to: the texture, the unwrap, the reconstruction's preview."""

import time

import numpy as np
import pytest
from tiny_bundle import make_tiny_bundle

from triptych.bundles.bundle import load_bundle
from triptych.errors import TriptychError
from triptych.geometry.isosurface import isosurface
from triptych.geometry.mesh import Mesh
from triptych.geometry.uv import unwrap
from triptych.images.views import prepare_views
from triptych.pipelines import reconstruct
from triptych.procedural import sample_object, sample_views
from triptych.render.course import Course
from triptych.render.texture import bake_texture, bake_vertex_colours, colour_from_views, vertex_colours_from_views
from triptych.sampling.flow_euler import Cancelled


@pytest.fixture(scope="module")
def views():
    return prepare_views(sample_views(64), size=64)


@pytest.fixture(scope="module")
def toy():
    return unwrap(sample_object(), texture_size=64)


WORK = {
    "texture": lambda toy, views, **told: bake_texture(toy, views, 64, **told),
    "vertex colours": lambda toy, views, **told: vertex_colours_from_views(toy, views, **told),
    "own colours": lambda toy, views, **told: bake_vertex_colours(toy, 64, **told),
    "all": lambda toy, views, **told: colour_from_views(toy, views, texture_size=64, **told),
}


@pytest.mark.parametrize("name", WORK)
def test_colouring_tells_its_progress_and_stops_wherever_it_is_told_to(toy, views, name):
    told, asked = [], []
    WORK[name](toy, views, progress=told.append, cancel=lambda: asked.append(0))
    assert told == sorted(told) and told[-1] == 1 and len(told) == len(asked) >= 5
    if name != "own colours":
        assert len(told) >= 4 + len(views.cameras), "between the views too"
    for stop in (1, len(asked) // 2, len(asked)):
        count = []
        with pytest.raises(Cancelled):
            WORK[name](toy, views, cancel=lambda count=count, stop=stop: count.append(0) or len(count) == stop)
        assert len(count) == stop, "nothing goes on after that"


def test_a_stretch_of_a_stretch():
    told = []
    part = Course(told.append).part(0.4, 0.8).part(0.5, 1.0)
    part.at(0.0)
    part.at(1.0)
    assert told == pytest.approx([0.6, 0.8])


def test_an_unwrap_is_ended_midway():
    """xatlas takes seconds for this mesh and asks nobody; the process that it runs in is ended."""
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, 64)] * 3, indexing="ij"))
    waves = 0.05 * np.sin(25 * grid).prod(axis=0)
    mesh = isosurface((0.7 - np.sqrt((grid**2).sum(axis=0)) + waves).astype(np.float32) * 30)
    assert len(mesh.faces) > 12_000
    times = []

    def cancel():
        times.append(time.monotonic())
        return len(times) > 2

    with pytest.raises(Cancelled):
        unwrap(mesh, texture_size=1024, cancel=cancel)
    assert len(times) == 3
    assert time.monotonic() - times[-1] < 5, "ended, not waited for"


def test_unwrapping_apart_gives_the_same_layout():
    mesh = Mesh(sample_object().vertices, sample_object().faces)
    assert len(mesh.faces) >= 2000
    here, apart = unwrap(mesh, texture_size=256), unwrap(mesh, texture_size=256, cancel=lambda: False)
    np.testing.assert_array_equal(apart.uv, here.uv)
    np.testing.assert_array_equal(apart.uv_faces, here.uv_faces)


def test_every_step_shows_the_solid_and_outlines_are_drawn_once(tmp_path, views, toy, monkeypatch):
    make_tiny_bundle(tmp_path)
    bundle = load_bundle(tmp_path)
    shown, drawn, given = [], [], []
    plain = reconstruct.outlines_of
    monkeypatch.setattr(reconstruct, "outlines_of", lambda *a: drawn.append(plain(*a)) or drawn[-1])
    monkeypatch.setattr(reconstruct, "has_second_stage", lambda _: True)
    monkeypatch.setattr(reconstruct, "latents_of", lambda views, field, bundle, settings, **_: given.append(settings))
    monkeypatch.setattr(reconstruct, "surface_from_latents", lambda *a: given.append(a[-1]) or toy)
    settings = reconstruct.Settings(steps=3, ensemble=2, texture_size=0, slat_steps=5, slat_guidance=1.5)
    told = []
    made = reconstruct.mesh_from_views(
        views, bundle, settings, preview=shown.append, progress=lambda stage, share: told.append(share)
    )
    assert len(shown) == 3 and all(field.shape == made.field.shape and (field > 0).any() for field in shown)
    assert len(drawn) == 1 and given[1] is drawn[0].allowed
    assert (given[0].slat_steps, given[0].slat_guidance) == (5, 1.5)
    assert told == sorted(told) and told[-1] == 1
    own = reconstruct.mesh_from_views(views, bundle, reconstruct.Settings(ensemble=1, texture_size=0)).settings
    assert (own.steps, own.slat_steps, own.slat_guidance, own.second_stage) == (2, 1, 0.0, True)
    for wrong, words in (({"slat_steps": 0}, "second stage's steps"), ({"slat_guidance": -1.0}, "second stage's guid")):
        with pytest.raises(TriptychError, match=words):
            reconstruct.mesh_from_views(views, bundle, reconstruct.Settings(**wrong))
