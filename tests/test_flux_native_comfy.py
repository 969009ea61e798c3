"""Our LoRA files, exports and nodes in a real ComfyUI that knows FLUX.2 klein: the numbers are those of diffusers.

Needs a ComfyUI of 0.9.2 or newer at COMFYUI_DIR, or beside it; skipped without one.
"""

import copy
import json
import os
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from comfy_server import ROOT, ComfyServer, find_comfy
from flux_tiny import (
    copied,
    klein_folder,
    klein_pipeline,
    kontext_folder,
    kontext_pipeline,
    write_klein_card,
)
from PIL import Image
from safetensors.torch import load_file, save_file

from triptych.flux.backend import load_flux_views
from triptych.flux.card import read_card
from triptych.flux.lora import apply_lora, not_mappable, remove_loras, save_lora
from triptych.flux.native import export_native
from triptych.geometry.files import read_mesh
from triptych.images.sheets import flatten, join_sheet
from triptych.images.views import prepare_views
from triptych.procedural import sample_views

pytest.importorskip("peft")
RANK, ALPHA, SEED, GUIDANCE = 4, 9.0, 5, 2.0
SETTINGS = {
    "negative": "", "size": 128, "foreground": "auto", "mask_shows": "auto", "panel_size": 0, "steps": 0, "shift": 0.0,
    "background": "the model's", "template": "",
}  # fmt: skip
ROUTES = {
    "text": {"prompt": "a red chair", "views": []},
    "photo": {"prompt": "", "views": ["front"]},
    "two": {"prompt": "a blue cube", "views": ["front", "back"], "strength": 1.0},
    "lora": {"prompt": "a red chair", "views": [], "strength": 0.7},
}


def klein_comfy() -> tuple[Path, Path] | str:
    """The checkout and its Python, or why there is none: the one that tests use, else the newest beside it."""
    found = find_comfy()
    if isinstance(found, str):
        return found
    places = [found[0], *sorted(path for path in found[0].parent.iterdir() if path != found[0])]
    known = {place: version for place in places if (version := comfy_version(place)) >= (0, 9, 2)}
    if not known:
        return f"the ComfyUI at {found[0]} does not know FLUX.2 klein: update it to 0.9.2 or newer, or set COMFYUI_DIR"
    place = found[0] if found[0] in known else max(known, key=lambda place: known[place])
    if place == found[0]:
        return found
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COMFYUI_DIR", str(place))
        return find_comfy()


def comfy_version(folder: Path) -> tuple[int, ...]:
    file = folder / "comfyui_version.py"
    text = file.read_text() if file.is_file() else ""
    return tuple(map(int, re.findall(r"\d+", text.rpartition("__version__")[2])[:3]))


FOUND = klein_comfy()
pytestmark = [
    pytest.mark.skipif(isinstance(FOUND, str), reason=str(FOUND)),
    pytest.mark.timeout(1800),  # a busy machine takes minutes for the start alone
]


def lora_of(transformer, architecture: str, path: Path) -> Path:
    """A random LoRA of every layer that may have one, alpha != rank, as PEFT trains it; the transformer keeps none.

    So it tests the default targets, and that what `not_mappable` does not name is really not dropped.
    """
    from peft import LoraConfig, get_peft_model_state_dict

    torch.manual_seed(1)
    layers = {name for name, module in transformer.named_modules() if isinstance(module, torch.nn.Linear)}
    targets = "|".join(re.escape(name) for name in sorted(layers - set(not_mappable(architecture))))
    transformer.add_adapter(LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets, init_lora_weights=False))
    save_lora(path, get_peft_model_state_dict(transformer), RANK, ALPHA, "a small model", architecture)
    transformer.unload_lora()
    return path


@pytest.fixture(scope="module")
def small_klein(tmp_path_factory) -> Path:
    """A random klein that reads as many tokens as ComfyUI makes of every text."""
    folder = copied(klein_folder(), tmp_path_factory.mktemp("models") / "small")
    write_klein_card(folder, max_sequence_length=512)
    return folder


@pytest.fixture(scope="module")
def photo() -> torch.Tensor:
    image = torch.ones(1, 96, 80, 3)
    image[:, 20:80, 20:60] = 0.5 * torch.rand(1, 60, 40, 3, generator=torch.Generator().manual_seed(4))
    return image


@pytest.fixture(scope="module")
def drawn() -> dict[str, np.ndarray]:
    """Four views (64, 64, 4) of a known object, as a perfect model would draw them."""
    views = prepare_views(sample_views(256), size=64)
    return dict(zip(views.names, views.images.permute(0, 2, 3, 1).numpy(), strict=True))


@pytest.fixture(scope="module")
def inputs(photo, drawn) -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    return {
        "klein.x": torch.randn(1, 128, 4, 4), "klein.t": torch.tensor([0.7]), "klein.context": torch.randn(1, 512, 96),
        "klein.reference": torch.randn(1, 128, 2, 2),
        "kontext.x": torch.randn(1, 16, 8, 8), "kontext.t": torch.tensor([0.4]),
        "kontext.context": torch.randn(1, 9, 32), "kontext.reference": torch.randn(1, 16, 4, 4),
        "kontext.pooled": torch.randn(1, 32), "kontext.guidance": torch.tensor([2.5]), "photo": photo,
        "sheet": torch.from_numpy(flatten(join_sheet(drawn), (1.0, 0.0, 1.0)))[None].contiguous(),
    }  # fmt: skip


@pytest.fixture(scope="module")
def comfy(tmp_path_factory, inputs, small_klein) -> tuple[dict[str, torch.Tensor], dict, Path]:
    """What ComfyUI made of the exports, the LoRAs and the native route; and the folder with the files."""
    folder = tmp_path_factory.mktemp("job")
    save_file(inputs, folder / "inputs.safetensors")
    lora_of(klein_pipeline().transformer, "flux2-klein", folder / "klein_lora.safetensors")
    lora_of(kontext_pipeline().transformer, "flux1-kontext", folder / "kontext_lora.safetensors")
    export_native(klein_folder(), folder / "klein.safetensors", dtype="fp32")
    export_native(kontext_folder(), folder / "kontext.safetensors", dtype="fp32")
    loras = {name: str(folder / f"{name}_lora.safetensors") for name in ("klein", "kontext")}
    job = {
        "files": {
            name: {
                "model": str(folder / f"{name}.safetensors"),
                "loras": {"full": [loras[name], 1.0], "half": [loras[name], 0.5]},
            }
            for name in loras
        },
        "folder": str(small_klein),
        "short": str(klein_folder(card=True)),
        "settings": SETTINGS,
        "seed": SEED,
        "guidance": GUIDANCE,
        "routes": {
            name: route | ({"lora": loras["klein"]} if "strength" in route else {}) for name, route in ROUTES.items()
        },
    }
    (folder / "job.json").write_text(json.dumps(job))
    place, python = FOUND
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [str(python), str(ROOT / "tests" / "comfy_flux.py"), str(folder)]
    ended = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=1500)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return load_file(folder / "results.safetensors"), json.loads((folder / "results.json").read_text()), folder


def grid_ids(index: float, height: int, width: int, axes: int) -> torch.Tensor:
    ids = torch.zeros(height, width, axes)
    ids[..., 0], ids[..., 1], ids[..., 2] = index, torch.arange(height)[:, None], torch.arange(width)
    return ids.flatten(0, 1)


@torch.no_grad()
def klein_forward(transformer, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    parts = [inputs[f"klein.{name}"].flatten(2).transpose(1, 2) for name in ("x", "reference")]
    text_ids = torch.zeros(512, 4)
    text_ids[:, 3] = torch.arange(512)
    made = transformer(
        hidden_states=torch.cat(parts, dim=1), timestep=inputs["klein.t"], guidance=None,
        encoder_hidden_states=inputs["klein.context"], txt_ids=text_ids[None],
        img_ids=torch.cat([grid_ids(0, 4, 4, 4), grid_ids(10, 2, 2, 4)])[None], return_dict=False,
    )[0][:, :16]  # fmt: skip
    return made.transpose(1, 2).unflatten(2, (4, 4))


@torch.no_grad()
def kontext_forward(transformer, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    def packed(latent: torch.Tensor) -> torch.Tensor:
        return latent.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)

    parts = [packed(inputs[f"kontext.{name}"]) for name in ("x", "reference")]
    made = transformer(
        hidden_states=torch.cat(parts, dim=1), timestep=inputs["kontext.t"], guidance=inputs["kontext.guidance"],
        pooled_projections=inputs["kontext.pooled"], encoder_hidden_states=inputs["kontext.context"],
        txt_ids=torch.zeros(9, 3), img_ids=torch.cat([grid_ids(0, 4, 4, 3), grid_ids(1, 2, 2, 3)]), return_dict=False,
    )[0][:, :16]  # fmt: skip
    return made.reshape(1, 4, 4, 16, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(1, 16, 8, 8)


@pytest.mark.parametrize("name", ["klein", "kontext"])
def test_an_exported_model_and_its_lora_give_diffusers_numbers(comfy, inputs, name):
    found, _, folder = comfy
    forward = {"klein": klein_forward, "kontext": kontext_forward}[name]
    pipeline = klein_pipeline() if name == "klein" else kontext_pipeline()
    plain = forward(pipeline.transformer, inputs)
    torch.testing.assert_close(found[f"{name}.plain"], plain, atol=1e-5, rtol=0)
    for label, strength in {"full": 1.0, "half": 0.5}.items():
        remove_loras(pipeline)
        apply_lora(pipeline, folder / f"{name}_lora.safetensors", strength)
        changed = forward(pipeline.transformer, inputs)
        torch.testing.assert_close(found[f"{name}.{label}"], changed, atol=1e-5, rtol=0)
        assert (changed - plain).abs().max() > 0.01
    remove_loras(pipeline)
    pipeline.load_lora_weights(str(folder / f"{name}_lora.safetensors"))
    torch.testing.assert_close(found[f"{name}.full"], forward(pipeline.transformer, inputs), atol=1e-5, rtol=0)


@torch.no_grad()
def test_the_vae_node_gives_diffusers_pictures(comfy, photo):
    """ComfyUI's picture is no farther from the one of double precision than diffusers' own is (a random autoencoder
    makes much of every rounding, and which roundings there are depends on the processor)."""
    pixels = photo[:, :96, :80].permute(0, 3, 1, 2) * 2 - 1

    def through(vae, pixels):
        latent = vae.encode(pixels).latent_dist.mode()
        return (vae.decode(latent).sample.permute(0, 2, 3, 1) / 2 + 0.5).clamp(0, 1)

    vae = klein_pipeline().vae
    exact = through(copy.deepcopy(vae).double(), pixels.double())
    rounding = float((through(vae, pixels) - exact).abs().max())
    assert rounding < 2e-3
    torch.testing.assert_close(comfy[0]["picture"].double(), exact, atol=3 * rounding, rtol=0)


@pytest.mark.parametrize("name", ROUTES)
def test_the_native_route_draws_what_the_other_route_draws(comfy, small_klein, name):
    found, told, folder = comfy
    strength = ROUTES[name].get("strength")
    lora = folder / "klein_lora.safetensors" if strength else None
    model = load_flux_views(small_klein, lora=lora, lora_strength=strength or 1.0)
    views = ROUTES[name]["views"]
    text = f"{ROUTES[name]['prompt']}. given: {', '.join(views) or 'nothing'}."
    assert told[name]["text"].split("\n")[0] == text
    assert told[name]["guidance"] == read_card(small_klein).usual(bool(views))[1]
    assert not views or told[name]["mirrored"] == [2 * len(views), len(views)]
    assert told[name]["missing"] == [view for view in ("front", "left", "back", "right") if view not in views]
    assert ("reference_latents" in told[name]["kept"]) == bool(views)
    assert found[f"{name}.latent"].shape == (1, 128, 8, 8) and not found[f"{name}.latent"].any()
    assert found[f"{name}.sigmas"].tolist() == [1.0, 0.5, 0.0]
    torch.testing.assert_close(found[f"{name}.embedding"], model._encode(text), atol=1e-5, rtol=0)
    references = list(found[f"{name}.references"].permute(0, 3, 1, 2)) if views else []
    assert len(references) == len(views)
    wanted = model.sheet(text, references, seed=SEED, steps=2, guidance=GUIDANCE)
    torch.testing.assert_close(found[f"{name}.sheet"][0].permute(2, 0, 1), wanted, atol=1e-4, rtol=0)


def test_splitting_finds_the_drawn_views(comfy, drawn):
    views = comfy[0]["split.views"].permute(0, 2, 3, 1).numpy()
    assert views.shape == (4, 64, 64, 4) and comfy[0]["split.sheet"].shape == (1, 128, 128, 3)
    assert comfy[0]["split.sides"].shape == (4, 64, 64, 3)
    for found, wanted in zip(views, drawn.values(), strict=True):
        both = (found[..., 3] > 0.5) & (wanted[..., 3] > 0.5)
        assert both.sum() > 0.93 * ((found[..., 3] > 0.5) | (wanted[..., 3] > 0.5)).sum()
        assert np.abs(found - wanted)[both].mean() < 0.03


def test_splitting_puts_the_given_views_back(comfy, photo):
    found, told, _ = comfy
    given = prepare_views({"front": photo[0].numpy()}, size=128).images[0]
    for name, expected in {"text": "front, left, back, right", "photo": "left, back, right"}.items():
        assert found[f"{name}.views"].shape == (4, 4, 128, 128) and found[f"{name}.masks"].shape == (4, 128, 128)
        assert found[f"{name}.mask"].shape == (1, 256, 256)
        assert told[name]["info"].split("\n")[0] == f"drawn: {expected}"
    front = found["photo.views"][0]
    solid = (front[3] > 0.99) & (given[3] > 0.99)
    share = solid.sum() / (given[3] > 0.99).sum()
    assert share > 0.6 and (found["text.views"][0] - front)[:3, solid].abs().mean() > 0.05
    assert "the object is only 60 pixels large" in told["photo"]["info"]


def test_what_cannot_work_is_said(comfy):
    wanted = [
        "the prompt is empty and no picture is given",
        "all four views are connected, so there is nothing to draw",
        "the panel size 100 is no multiple of 16",
        "the template 'a sheet' has no place for the prompt",
        "the VAE has 4 latent channels, Flux has 128",
        "the sheet is a batch of 2 pictures",
        "a view sheet must be",
        "model_index.json cannot be read",
        "random klein reads 64 tokens of text, and ComfyUI fills FLUX.2's text up to 512",
    ]
    said = comfy[1]["refusals"]
    assert len(said) == len(wanted)
    for sentence, part in zip(said, wanted, strict=True):
        assert part in sentence


def test_references_and_loras_change_the_sheet(comfy):
    sheets = [comfy[0][f"{name}.sheet"] for name in ROUTES]
    for i, one in enumerate(sheets):
        assert all((one - other).abs().max() > 1e-3 for other in sheets[:i])


# ------------------------------------------------------------------------------------------------------- the workflow


def with_tiny_loaders(graph: dict, model: str, lora: str) -> dict:
    """The workflow with the three core loaders replaced by ours, and short settings."""
    kinds = {node["class_type"]: key for key, node in graph.items()}
    outputs = {kinds[kind]: slot for slot, kind in enumerate(("UNETLoader", "CLIPLoader", "VAELoader"))}
    graph = {key: node for key, node in graph.items() if key not in outputs}
    graph["tiny"] = {"class_type": "Triptych_FluxTinyNative", "inputs": {"name": model}}
    short = {
        "LoraLoaderModelOnly": {"lora_name": lora}, "LoadImage": {"image": "front.png"},
        "Triptych_FluxPrepare": {"size": 128}, "Triptych_Reconstruct": {"steps": 2, "ensemble": 1},
        "Triptych_CleanMesh": {"target_faces": 1500}, "Triptych_TextureMesh": {"texture_size": 128},
    }  # fmt: skip
    for node in graph.values():
        node["inputs"] = {
            name: ["tiny", outputs[value[0]]] if isinstance(value, list) and value[0] in outputs else value
            for name, value in node["inputs"].items()
        } | short.get(node["class_type"], {})
    return graph


@pytest.mark.slow
def test_the_workflow_makes_an_obj_through_comfyuis_sampler(tmp_path, comfy, small_klein, photo, monkeypatch):
    monkeypatch.setenv("COMFYUI_DIR", str(FOUND[0]))
    graph = json.loads((ROOT / "workflows" / "api" / "photo_to_obj_klein.api.json").read_text())
    (tmp_path / "input").mkdir()
    pixels = (photo[0] * 255).round().byte().numpy()
    Image.fromarray(pixels).save(tmp_path / "input" / "front.png")
    for place in ("models/triptych", "models/loras"):
        (tmp_path / place).mkdir(parents=True)
    (tmp_path / "models" / "triptych" / "small").symlink_to(small_klein, target_is_directory=True)
    (tmp_path / "models" / "loras" / "views.safetensors").symlink_to(comfy[2] / "klein_lora.safetensors")
    with ComfyServer(tmp_path) as server:
        result = server.client().run(with_tiny_loaders(graph, "small", "views.safetensors"))
    said = [text for output in result.outputs.values() for text in output.get("text", ())]
    assert any(text.startswith(". given: front.") for text in said)
    assert any(text.startswith("drawn: ") for text in said)
    mesh = read_mesh(next((tmp_path / "output").rglob("*.obj")))
    assert len(mesh.faces) > 100 and mesh.uv is not None
