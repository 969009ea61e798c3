// Load mesh takes files: by its button, and dropped on the node, a mesh together with what lies beside it.
//
// Each upload has a folder of its own below input, because an OBJ finds its MTL, and the MTL its pictures, by their plain
// names: in one folder for all, a second "material.mtl" would be renamed or replace the first. The folder's name follows
// from the files, so that the same ones come to the same place again.
import { uploadImage, type MakeUrl } from "./api";
import { after } from "./events";
import type { ComfyNode, Widget } from "./types";
import type { Words } from "./words";

const FOLDER = "triptych";
const MESHES = [".obj", ".glb", ".gltf", ".ply", ".stl", ".off"]; // as nodes/paths.py
const COMPANIONS = [".mtl", ".bin", ".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tga", ".tif", ".tiff"]; // as api/companions.py
const LONGEST = 24; // characters of a folder's name before its mark

export function addUpload(node: ComfyNode, api: MakeUrl, words: Words, say: (sentence: string) => void): void {
  const input = document.createElement("input");
  Object.assign(input, { type: "file", multiple: true, hidden: true, accept: [...MESHES, ...COMPANIONS].join(",") });
  input.className = "triptych-mesh-files";
  document.body.append(input);
  after(node, "onRemoved", () => input.remove());
  // Its name is its text where Nodes 2.0 show no label of a button (1.27).
  const button = node.addWidget("button", words.uploadMesh, null, () => input.click(), { serialize: false });
  button.label = words.uploadMesh;
  button.serialize = false;
  let last = Promise.resolve();
  const take = (files: File[]): void => {
    // One after the other: the mesh of the last one is the node's in the end.
    last = last.then(async () => {
      button.label = words.uploading;
      say(await upload(node, files, api, words).catch((error: Error) => error.message));
      button.label = words.uploadMesh;
    });
  };
  input.addEventListener("change", () => {
    take([...(input.files ?? [])]);
    input.value = ""; // or the same files could not be chosen again
  });
  node.onDragOver = event => [...(event.dataTransfer?.items ?? [])].some(item => item.kind === "file");
  node.onDragDrop = event => {
    const files = [...(event.dataTransfer?.files ?? [])];
    // The rest is for ComfyUI: a graph, or a picture that holds one.
    const ours = files.some(isMesh) || (files.some(isCompanion) && homeOf(node) !== null);
    if (ours) take(files);
    return ours;
  };
}

/** Uploads and chooses the first mesh; what the user should know, empty when there is nothing. Throws a sentence. */
async function upload(node: ComfyNode, files: File[], api: MakeUrl, words: Words): Promise<string> {
  const meshes = files.filter(isMesh);
  const beside = files.filter(isCompanion);
  const home = meshes[0] ? folderFor(meshes[0], files) : beside.length ? homeOf(node) : null;
  if (home === null) throw new Error(words.noMesh(files.map(file => file.name).join(", "), MESHES.join(" ")));
  for (const file of beside) await uploadImage(api, file, file.name, home, true);
  // The meshes last: until then the node keeps the mesh that it has.
  const names: string[] = [];
  for (const file of meshes) names.push(await uploadImage(api, file, file.name, home, true));
  choose(node, names);
  const rest = files.filter(file => !isMesh(file) && !isCompanion(file)).map(file => file.name);
  return rest.length ? words.leftOut(rest.join(", ")) : "";
}

function choose(node: ComfyNode, names: string[]): void {
  const widget = fileWidget(node);
  if (!widget || !names[0]) return;
  const values = widget.options?.values;
  if (Array.isArray(values)) values.push(...names.filter(name => !values.includes(name)));
  widget.value = names[0];
  widget.callback?.(names[0]);
  node.graph?.setDirtyCanvas?.(true, true);
}

/** The folder of the chosen mesh when it was uploaded here, for an MTL or a picture that comes later. */
function homeOf(node: ComfyNode): string | null {
  const parts = String(fileWidget(node)?.value ?? "").split("/");
  return parts.length === 3 && parts[0] === FOLDER ? parts.slice(0, 2).join("/") : null;
}

function folderFor(mesh: File, files: File[]): string {
  const stem = mesh.name.replace(/\.\w+$/, "").replace(/[^\p{L}\p{N}_-]+/gu, "-");
  const mark = hash(files.map(file => [file.name, file.size, file.lastModified].join("/")).sort().join("\n"));
  return `${FOLDER}/${[...stem].slice(0, LONGEST).join("")}-${mark}`;
}

/** FNV-1a; crypto.subtle is not there on plain HTTP, as ComfyUI often is. */
function hash(text: string): string {
  let value = 0x811c9dc5;
  for (const byte of new TextEncoder().encode(text)) value = Math.imul(value ^ byte, 0x01000193) >>> 0;
  return value.toString(16).padStart(8, "0");
}

const fileWidget = (node: ComfyNode): Widget | undefined => node.widgets?.find(widget => widget.name === "file");
const isMesh = (file: File): boolean => endsWith(file, MESHES);
const isCompanion = (file: File): boolean => endsWith(file, COMPANIONS);

function endsWith(file: File, suffixes: string[]): boolean {
  const name = file.name.toLowerCase();
  return suffixes.some(suffix => name.endsWith(suffix));
}
