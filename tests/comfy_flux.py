"""Runs inside a ComfyUI's Python, with its checkout as working directory: what ComfyUI makes of our files.

    python tests/comfy_flux.py JOB_FOLDER

The folder holds job.json and inputs.safetensors (see tests/test_flux_native_comfy.py); results.safetensors and
results.json are written beside them. Only ComfyUI's own functions compute here, but for our nodes in `route`.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(Path.cwd()))
FOLDER = Path(sys.argv[1])
sys.argv = sys.argv[:1]

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing(False)
from comfy.cli_args import args  # noqa: E402

args.cpu = True

import comfy.sd  # noqa: E402
import comfy.utils  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402


def pack() -> ModuleType:
    """This repository, imported as ComfyUI imports custom nodes."""
    name = "triptych_pack"
    spec = importlib.util.spec_from_file_location(name, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def forward(patcher: Any, given: dict[str, torch.Tensor]) -> torch.Tensor:
    """One evaluation of the network, as a sampler calls it: the velocity."""
    comfy.model_management.load_models_gpu([patcher])
    model = patcher.model
    refs = [given["reference"]] if "reference" in given else None
    extra = {"y": given["pooled"], "guidance": given["guidance"]} if "pooled" in given else {}
    with torch.inference_mode():
        return model.diffusion_model(
            given["x"], given["t"], context=given["context"], ref_latents=refs, **extra
        ).float()  # fmt: skip


def files(job: dict[str, Any], given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What the exported transformers and the LoRA files do in ComfyUI's loaders."""
    made = {}
    for name, wanted in job["files"].items():
        patcher = comfy.sd.load_diffusion_model(wanted["model"], model_options={"dtype": torch.float32})
        inputs = {key.removeprefix(f"{name}."): value for key, value in given.items() if key.startswith(f"{name}.")}
        made[f"{name}.plain"] = forward(patcher, inputs)
        for label, (lora, strength) in wanted["loras"].items():
            state = comfy.utils.load_torch_file(lora, safe_load=True)
            patched, _ = comfy.sd.load_lora_for_models(patcher, None, state, strength, 0.0)
            made[f"{name}.{label}"] = forward(patched, inputs)
    return made


def route(job: dict[str, Any], given: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The native route with this pack's nodes and ComfyUI's sampler, LoRA loader and VAE."""
    from comfy_extras import nodes_custom_sampler as core

    pack()
    from triptych_pack.nodes import flux_models, flux_native  # type: ignore[import-not-found]

    model, clip, vae = flux_models.load_small_klein(Path(job["folder"]))
    made, told = {"picture": vae.decode(vae.encode(given["photo"]))}, {}
    flux_native.ui.PreviewImage = lambda *_, **__: type("Shown", (), {"as_dict": lambda self: {}})()
    for name, wanted in job["routes"].items():
        used = model
        if wanted.get("lora"):
            state = comfy.utils.load_torch_file(wanted["lora"], safe_load=True)
            used, _ = comfy.sd.load_lora_for_models(model, None, state, wanted["strength"], 0.0)
        views = {view: given["photo"] for view in wanted["views"]}
        prepared = flux_native.FluxPrepare.execute(clip, vae, **job["settings"], prompt=wanted["prompt"], **views)
        positive, negative, latent, sigmas, plan, references, text, guidance = prepared.args
        noise = core.Noise_RandomNoise(job["seed"])
        guider = comfy.samplers.CFGGuider(used)
        guider.set_conds(positive, negative)
        guider.set_cfg(job["guidance"])
        sampler = comfy.samplers.sampler_object("euler")
        with torch.inference_mode():
            drawn = guider.sample(
                noise.generate_noise(latent), latent["samples"], sampler, sigmas, disable_pbar=True, seed=job["seed"]
            )
            sheet = vae.decode(drawn)
        made |= {f"{name}.sheet": sheet, f"{name}.embedding": positive[0][0], f"{name}.references": references}
        made |= {f"{name}.latent": latent["samples"], f"{name}.sigmas": sigmas}
        told[name] = {"text": text, "kept": sorted(positive[0][1]), "missing": plan.missing, "guidance": guidance}
        if views:
            told[name]["mirrored"] = [
                len(
                    flux_native.FluxPrepare.execute(
                        clip, vae, **job["settings"], prompt="", **views, mirrored=choice
                    ).args[5]
                )
                for choice in ("yes", "no")
            ]
        split = flux_native.FluxSplit.execute(given["sheet"], "the model's", 0, plan)
        made |= {f"{name}.views": split.args[0].images, f"{name}.mask": split.args[2], f"{name}.masks": split.args[7]}
        told[name]["info"] = split.args[8]
    views, sheet, mask, *sides, masks, info = flux_native.FluxSplit.execute(given["sheet"], "magenta", 64).args
    made |= {"split.views": views.images, "split.sheet": sheet, "split.sides": torch.cat(sides)}
    return made, told | {"refusals": refusals(flux_native, flux_models, clip, vae, job, given["photo"])}


def refusals(native: ModuleType, models: ModuleType, clip: Any, vae: Any, job: dict, photo: Any) -> list[str]:
    """What the nodes say to settings that cannot work."""
    settings, short = job["settings"], job["short"]
    four = dict.fromkeys(("front", "left", "back", "right"), photo)
    other = type("Other", (), {"latent_channels": 4})()
    wrong = [
        lambda: native.FluxPrepare.execute(clip, vae, **settings, prompt=" "),
        lambda: native.FluxPrepare.execute(clip, vae, **settings, prompt="", **four),
        lambda: native.FluxPrepare.execute(clip, vae, **settings | {"panel_size": 100}, prompt="a chair"),
        lambda: native.FluxPrepare.execute(clip, vae, **settings | {"template": "a sheet"}, prompt="a chair"),
        lambda: native.FluxPrepare.execute(clip, other, **settings, prompt="a chair"),
        lambda: native.FluxSplit.execute(torch.cat([photo, photo]), "white", 0),
        lambda: native.FluxSplit.execute(photo, "white", 0),
        lambda: models.load_small_klein(FOLDER),
        lambda: models.load_small_klein(Path(short)),
    ]
    said = []
    for call in wrong:
        try:
            call()
        except ValueError as error:  # TriptychError is one
            said.append(str(error))
    return said


def main() -> None:
    job = json.loads((FOLDER / "job.json").read_text())
    given = load_file(FOLDER / "inputs.safetensors")
    made, told = files(job, given), {}
    if "folder" in job:
        more, told = route(job, given)
        made |= more
    save_file({key: value.contiguous().clone() for key, value in made.items()}, FOLDER / "results.safetensors")
    (FOLDER / "results.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main()
