// The ComfyUI extension, in classic nodes and in Nodes 2.0: the 3D viewer on Triptych's preview and export nodes, and on
// all of its nodes what their last run said; Load mesh takes files.
import { app } from "../../scripts/app.js";
import { sourcesOf, uploadImage, type MeshOutput } from "./comfy/api";
import { after } from "./comfy/events";
import { keepInNode } from "./comfy/mount";
import { NodeText } from "./comfy/text";
import type { ComfyNode } from "./comfy/types";
import { addUpload } from "./comfy/upload";
import { wordsFor } from "./comfy/words";
import { Viewer, type ViewState } from "./viewer/index";

const PREFIX = "Triptych_";
const VIEWERS = new Set(["Triptych_Preview3D", "Triptych_CompareMeshes", "Triptych_ExportMesh"]);
const LOAD_MESH = "Triptych_LoadMesh";
const LAST_OUTPUT = "Triptych last output";
const VIEW = "Triptych view";
const LOAD_IMAGE = "Triptych picture node";
const SMALLEST: [number, number] = [320, 340];
const VIEW_HEIGHT = 240;

const api = (path: string): string => app.api?.apiURL(path) ?? `/api${path}`;
const viewers = new WeakMap<ComfyNode, Viewer>();

function language(): string {
  const name = "Comfy.Locale";
  const value = app.extensionManager?.setting?.get(name) ?? app.ui?.settings?.getSettingValue?.(name);
  return typeof value === "string" ? value : document.documentElement.lang;
}

function attach(node: ComfyNode): void {
  const host = document.createElement("div");
  host.className = "triptych-viewer";
  Object.assign(host.style, { width: "100%", height: "100%", minHeight: `${VIEW_HEIGHT}px`, borderRadius: "6px" });
  const viewer = new Viewer(host, {
    language: language(),
    state: (node.properties[VIEW] as Partial<ViewState> | undefined) ?? {},
    onState: state => { node.properties[VIEW] = state; },
    toInput: picture => pictureToInput(node, picture),
  });
  viewers.set(node, viewer);
  // A DOM widget must be the last one, or Nodes 2.0 lays the others out below it.
  const widget = node.addDOMWidget("triptych_viewer", "triptych_viewer", host, {
    serialize: false,
    hideOnZoom: false,
    // The frontend keeps a margin of 10 px around it, and a text may follow.
    getMinHeight: () => VIEW_HEIGHT + 20,
    getValue: () => "",
    setValue: () => undefined,
  });
  widget.serialize = false;
  node.setSize([Math.max(node.size[0], SMALLEST[0]), Math.max(node.size[1], SMALLEST[1])]);
  after(node, "onExecuted", output => {
    const meshes = output as MeshOutput | null;
    if (!meshes || !(meshes["3d"] ?? meshes.triptych)) return;
    const { "3d": files, files: written, triptych } = meshes;
    node.properties[LAST_OUTPUT] = { "3d": files, files: written, triptych };
    show(node, viewer);
  });
  // A graph that is opened, pasted or undone brings its properties after the node was made.
  after(node, "onConfigure", () => {
    const state = node.properties[VIEW] as ViewState | undefined;
    if (state) viewer.restore(state);
    show(node, viewer);
  });
  const release = keepInNode(node, host, SMALLEST[0]);
  after(node, "onRemoved", () => { release(); viewer.dispose(); });
}

function show(node: ComfyNode, viewer: Viewer): void {
  const output = node.properties[LAST_OUTPUT] as MeshOutput | undefined;
  if (!output) return;
  const sources = sourcesOf(output, api);
  // The comparison is what a second model was connected for.
  const compares = sources.length > 1 && viewer.state.against === null && !node.properties[VIEW];
  if (compares) viewer.state.against = 1;
  void viewer.show(sources);
}

/** Uploads the picture and shows it in a Load Image node beside this one, made at the first picture. */
async function pictureToInput(node: ComfyNode, picture: Blob): Promise<string> {
  const name = await uploadImage(api, picture, `triptych_${node.id}_${Date.now()}.png`, "triptych");
  const graph = node.graph;
  const known = node.properties[LOAD_IMAGE] as number | string | undefined;
  let loader = known === undefined ? null : (graph?.getNodeById(known) ?? null);
  if (!loader) {
    loader = window.LiteGraph?.createNode("LoadImage") ?? null;
    if (!loader || !graph) return `The picture is in the input folder as ${name}.`;
    loader.pos = [node.pos[0] + node.size[0] + 40, node.pos[1]];
    graph.add(loader);
    node.properties[LOAD_IMAGE] = loader.id;
  }
  const widget = loader.widgets?.find(each => each.name === "image");
  const values = widget?.options?.values;
  if (Array.isArray(values) && !values.includes(name)) values.push(name);
  if (widget) {
    widget.value = name;
    widget.callback?.(name);
  }
  return `The picture is in the Load Image node beside this one, as ${name}.`;
}

app.registerExtension({
  name: "Triptych.Viewer",
  nodeCreated(node: ComfyNode) {
    const kind = node.comfyClass ?? node.type ?? "";
    if (!kind.startsWith(PREFIX)) return;
    const words = wordsFor(language());
    if (VIEWERS.has(kind)) attach(node);
    const text = new NodeText(node, words);
    if (kind === LOAD_MESH) addUpload(node, api, words, sentence => text.say(sentence));
  },
});

/** For tests and other extensions: the viewer of a node. */
Object.assign(window, { triptychViewers: viewers });
