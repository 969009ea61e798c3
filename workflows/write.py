"""Writes the workflows: NAME.json for ComfyUI's editor, which lists this folder among its templates, and
api/NAME.api.json for its servers. Run it after a node's inputs have changed:

    python workflows/write.py
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "tests")]

from object_info import object_info  # noqa: E402

from triptych.api.convert import convert  # noqa: E402

SIDES = ("front", "left", "back", "right")
WIDTH, GAP, LINE = 320, 80, 26
HEADER = 110  # of a group's title and the margin below it
# What a node shows below its settings, while it runs or after: ComfyUI takes 220 for pictures, our viewer 240.
PREVIEWS = {
    "LoadImage": 220, "Triptych_PrepareViews": 160, "Triptych_FluxViews": 420,
    "Triptych_FluxPrepare": 220, "Triptych_FluxSplit": 320, "Triptych_Reconstruct": 240,
    "Triptych_ExportMesh": 280, "Triptych_Preview3D": 420, "SaveImage": 260,
}  # fmt: skip
# Lines of text that a node usually has to say after a run, by which it grows (web/src/comfy/text.ts).
SAYS = {
    "Triptych_LoadMesh": 2, "Triptych_PrepareViews": 3, "Triptych_FluxViews": 5, "Triptych_FluxPrepare": 5,
    "Triptych_FluxSplit": 3, "Triptych_Reconstruct": 5, "Triptych_CleanMesh": 3, "Triptych_TextureMesh": 2,
    "Triptych_ExportMesh": 3,
}  # fmt: skip
TEXT_LINE, TEXT_FRAME = 15, 32


class Editor:
    """A workflow in the making: nodes stand in columns, and a link is named by the node and the output."""

    def __init__(self, info: dict[str, Any]) -> None:
        self._info = info
        self._nodes: list[dict[str, Any]] = []
        self._links: list[list[Any]] = []
        self._bottoms: dict[int, int] = {}

    def add(self, column: int, kind: str, title: str | None = None, **values: Any) -> int:
        """A node; values: settings, and (node, output) for links. Returns its id."""
        info, number = self._info[kind], len(self._nodes) + 1
        slots, stored, extra = [], [], []
        for section in ("required", "optional"):
            for name, spec in info["input"].get(section, {}).items():
                options = spec[1]
                widget = isinstance(spec[0], list) or spec[0] in ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
                slot = {"name": name, "type": "COMBO" if isinstance(spec[0], list) else spec[0], "link": None}
                slot |= {"widget": {"name": name}} if widget else {}
                slot |= {"shape": 7} if section == "optional" else {}
                given = values.pop(name, options.get("default"))
                if isinstance(given, tuple):
                    slot["link"] = self._link(given, number, len(slots), slot["type"])
                if widget:
                    stored += [given, *(["randomize"] if options.get("control_after_generate") else [])]
                    extra = ["image"] if options.get("image_upload") else extra
                slots.append(slot)
        assert not values, f"{kind} has no {sorted(values)}"
        names = info.get("output_name", info["output"])
        outputs = [{"name": n, "type": t, "links": []} for n, t in zip(names, info["output"], strict=True)]
        height = 40 + LINE * (len(stored) + max(len(outputs), sum("widget" not in slot for slot in slots)))
        says = TEXT_LINE * SAYS[kind] + TEXT_FRAME if kind in SAYS else 0
        self._place(column, height + PREVIEWS.get(kind, 0), {
            "id": number, "type": kind, "flags": {}, "mode": 0, "inputs": slots, "outputs": outputs,
            "properties": {"Node name for S&R": kind}, "widgets_values": [*stored, *extra],
            **({"title": title} if title else {}),
        }, says)  # fmt: skip
        return number

    def note(self, column: int, text: str) -> None:
        height = 90 + 22 * sum(1 + len(line) // 40 for line in text.split("\n"))
        self._place(column, height, {
            "id": len(self._nodes) + 1, "type": "MarkdownNote", "flags": {}, "mode": 0, "inputs": [], "outputs": [],
            "properties": {}, "widgets_values": [text], "title": "Read me", "color": "#432", "bgcolor": "#653",
        })  # fmt: skip

    def content(self) -> dict[str, Any]:
        for link, source, output, *_ in self._links:
            self._nodes[source - 1]["outputs"][output]["links"].append(link)
        return {
            "last_node_id": len(self._nodes), "last_link_id": len(self._links), "nodes": self._nodes,
            "links": self._links, "groups": [], "config": {}, "extra": {}, "version": 0.4,
        }  # fmt: skip

    def _link(self, source: tuple[int, int], target: int, slot: int, kind: str) -> int:
        number = len(self._links) + 1
        made = self._nodes[source[0] - 1]["outputs"][source[1]]["type"]
        assert made in kind.split(","), f"{made} does not fit {kind}"
        self._links.append([number, *source, target, slot, made])
        return number

    def _place(self, column: int, height: int, node: dict[str, Any], grows: int = 0) -> None:
        top = self._bottoms.get(column, HEADER)
        self._bottoms[column] = top + height + grows + GAP
        place = {"pos": [40 + column * (WIDTH + GAP), top], "size": [WIDTH, height], "order": len(self._nodes)}
        self._nodes.append(node | place)


def pictures(editor: Editor, sides: tuple[str, ...]) -> int:
    loaders = {side: editor.add(0, "LoadImage", side, image=f"{side}.png") for side in sides}
    links = {side: (node, 0) for side, node in loaders.items()}
    return editor.add(
        1, "Triptych_PrepareViews", **links, **{f"{side}_mask": (node, 1) for side, node in loaders.items()}
    )


def reconstruction(editor: Editor, views: int, fill: str, column: int = 1) -> None:
    """The mesh is reduced and painted after it is made, so that a change of either leaves the longest part cached."""
    bundle = editor.add(column, "Triptych_LoadBundle")
    made = editor.add(
        column + 1, "Triptych_Reconstruct", bundle=(bundle, 0), views=(views, 0), texture_size=0, target_faces=0
    )
    clean = editor.add(column + 1, "Triptych_CleanMesh", mesh=(made, 0), target_faces=12_000)
    painted = editor.add(column + 2, "Triptych_TextureMesh", mesh=(clean, 0), views=(views, 0), fill=fill)
    editor.add(column + 2, "Triptych_ExportMesh", mesh=(painted, 0))
    editor.add(column + 3, "Triptych_Preview3D", mesh=(painted, 0))


def views_to_obj(editor: Editor) -> None:
    views = pictures(editor, SIDES)
    reconstruction(editor, views, "diffuse")
    editor.note(
        1,
        "Load a picture of each side; left and right are the object's own. For a view that you do not have, select "
        "its loader and press Ctrl+M.\n\nThe OBJ, its MTL and its texture are written to output/mesh.",
    )


def image_to_obj(editor: Editor) -> None:
    views = pictures(editor, ("front",))
    reconstruction(editor, views, "mirror")
    editor.note(
        1,
        "Load one picture, seen from the front. Sides that it does not show are guessed; the texture of the back is "
        "mirrored or continued.\n\nThe OBJ, its MTL and its texture are written to output/mesh.",
    )


def text_to_obj(editor: Editor) -> None:
    model = editor.add(0, "Triptych_LoadFlux")
    views = editor.add(1, "Triptych_FluxViews", model=(model, 0), prompt="a red chair")
    reconstruction(editor, views, "diffuse")
    editor.note(
        0,
        "Write what the object is into the prompt. For other views of it, change the seed of Flux views; the sheet is "
        "shown on the node.\n\nThe embedded model knows simple sentences about colours, materials, shapes and common "
        "objects, and says which words it does not know.\n\nThe OBJ, its MTL and its texture are written to "
        "output/mesh.",
    )


def photo_to_obj(editor: Editor) -> None:
    model = editor.add(0, "Triptych_LoadFlux")
    photo = editor.add(0, "LoadImage", "front", image="front.png")
    views = editor.add(1, "Triptych_FluxViews", model=(model, 0), front=(photo, 0), front_mask=(photo, 1))
    reconstruction(editor, views, "diffuse")
    editor.note(
        0,
        "Load one picture, seen from the front; Flux views draws the left, back and right. A sentence in the prompt "
        "helps it. If you have pictures of further sides, connect them to Flux views too.\n\nThe OBJ, its MTL and its "
        "texture are written to output/mesh.",
    )


def photo_to_obj_klein(editor: Editor) -> None:
    """The native route: everything that computes is ComfyUI's own, so any loader, LoRA and sampler may stand there."""
    model = editor.add(0, "UNETLoader", unet_name="flux-2-klein-base-4b.safetensors", weight_dtype="default")
    lora = editor.add(0, "LoraLoaderModelOnly", model=(model, 0), lora_name="triptych_klein_views.safetensors")
    clip = editor.add(0, "CLIPLoader", clip_name="qwen_3_4b.safetensors", type="flux2", device="default")
    vae = editor.add(0, "VAELoader", vae_name="flux2-vae.safetensors")
    photo = editor.add(0, "LoadImage", "front", image="front.png")
    asked = editor.add(1, "Triptych_FluxPrepare", clip=(clip, 0), vae=(vae, 0), front=(photo, 0), front_mask=(photo, 1))
    noise = editor.add(2, "RandomNoise", noise_seed=0)
    sampler = editor.add(2, "KSamplerSelect", sampler_name="euler")
    guider = editor.add(2, "CFGGuider", model=(lora, 0), positive=(asked, 0), negative=(asked, 1), cfg=4.0)
    drawn = editor.add(
        2, "SamplerCustomAdvanced", noise=(noise, 0), guider=(guider, 0), sampler=(sampler, 0), sigmas=(asked, 3),
        latent_image=(asked, 2),
    )  # fmt: skip
    sheet = editor.add(2, "VAEDecode", samples=(drawn, 0), vae=(vae, 0))
    views = editor.add(3, "Triptych_FluxSplit", sheet=(sheet, 0), plan=(asked, 4))
    reconstruction(editor, views, "diffuse", column=3)
    editor.note(
        1,
        "FLUX.2 klein base 4B (Apache-2.0) with ComfyUI's own loaders and sampler, from ComfyUI 0.9.2. Put the model "
        "into models/diffusion_models, its text encoder into models/text_encoders, its VAE into models/vae, and a LoRA "
        "of the task flux_views into models/loras; without one, bypass Load LoRA (Ctrl+B).\n\nfp8 and GGUF loaders, "
        "further LoRAs and other samplers fit as well. With the distilled klein 4B, set 4 steps and cfg 1.\n\nThe OBJ, "
        "its MTL and its texture are written to output/mesh.",
    )


def clean_and_texture(editor: Editor) -> None:
    views = pictures(editor, SIDES)
    mesh = editor.add(1, "Triptych_LoadMesh", "mesh", file="model.obj", normalize=True)
    clean = editor.add(2, "Triptych_CleanMesh", mesh=(mesh, 0), target_faces=12_000)
    painted = editor.add(
        2, "Triptych_TextureMesh", mesh=(clean, 0), views=(views, 0), unwrap="always", fit_to_views=True
    )
    editor.add(3, "Triptych_ExportMesh", mesh=(painted, 0), filename_prefix="mesh/Triptych_clean")
    editor.add(3, "Triptych_Preview3D", mesh=(painted, 0), compare_with=(mesh, 0))
    editor.note(
        1,
        "Put the mesh into ComfyUI's input folder and press R. The pictures show its sides, with its front at +Z and "
        "its top at +Y; for a view that you do not have, select its loader and press Ctrl+M. To bake the mesh's "
        "vertex colours instead, mute Prepare views.",
    )


def turntable(editor: Editor) -> None:
    mesh = editor.add(0, "Triptych_LoadMesh", "mesh", file="model.obj")
    made = editor.add(1, "Triptych_RenderViews", mesh=(mesh, 0), count=16)
    editor.add(2, "SaveImage", images=(made, 0), filename_prefix="turntable/Triptych")
    editor.note(
        0, "Put the mesh into ComfyUI's input folder and press R. The pictures are written to output/turntable."
    )


WORKFLOWS = (text_to_obj, photo_to_obj, photo_to_obj_klein, views_to_obj, image_to_obj, clean_and_texture, turntable)


def main() -> None:
    with tempfile.TemporaryDirectory() as base:
        info = object_info(Path(base))
    (HERE / "api").mkdir(exist_ok=True)
    for fill_in in WORKFLOWS:
        editor = Editor(info)
        fill_in(editor)
        content = editor.content()
        (HERE / f"{fill_in.__name__}.json").write_text(json.dumps(content, indent=1) + "\n")
        graph = convert(content, info.get)
        (HERE / "api" / f"{fill_in.__name__}.api.json").write_text(json.dumps(graph, indent=2) + "\n")


if __name__ == "__main__":
    main()
