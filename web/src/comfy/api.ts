// ComfyUI's public HTTP API, as far as the pack's pages use it; and what the pack's nodes put into their UI output.
import { formatOf, type Source } from "../viewer/index";
import type { Format } from "../viewer/index";

/** A file as /view takes it. */
export interface FileEntry {
  filename: string;
  subfolder: string;
  type: string;
}

export interface ModelEntry extends FileEntry {
  format?: Format;
  label?: string;
}

export interface MeshOutput {
  "3d"?: FileEntry[];
  files?: FileEntry[];
  triptych?: { version: number; models: ModelEntry[] }[];
  text?: string[];
  images?: FileEntry[];
  triptych_views?: { generated: string[]; seed: number; rerolls: number; warnings: string[] }[];
}

export type MakeUrl = (path: string) => string;

export function viewUrl(api: MakeUrl, { filename, subfolder, type }: FileEntry): string {
  return api(`/view?${new URLSearchParams({ filename, subfolder, type })}`);
}

/** The meshes of a node's output, the one to show first at the front. */
export function sourcesOf(output: MeshOutput, api: MakeUrl): Source[] {
  const models: ModelEntry[] = output.triptych?.[0]?.models ?? output["3d"] ?? [];
  const sources: Source[] = [];
  for (const model of models) {
    const format = formatOf(model.filename);
    if (!format) continue;
    const folder = { subfolder: model.subfolder, type: model.type };
    const written = (output.files ?? []).filter(file => file.subfolder === folder.subfolder && formatOf(file.filename) === null);
    const files = format === "obj" ? [model, ...written] : [model];
    sources.push({
      name: model.label && models.length > 1 ? model.label : model.filename,
      url: viewUrl(api, model),
      format,
      beside: filename => viewUrl(api, { filename, ...folder }),
      // A preview's GLB is a temporary file: the downloads of other formats are written from it in the browser.
      files: { [format]: files.map(file => ({ name: file.filename, url: viewUrl(api, file) })) },
    });
  }
  return sources;
}

/** Puts a picture, or any other file, into ComfyUI's input folder; resolves with the name that nodes take. Without
 * `overwrite`, another file of that name stays and the new one is renamed. */
export async function uploadImage(api: MakeUrl, picture: Blob, filename: string, subfolder = "", overwrite = false): Promise<string> {
  const form = new FormData();
  form.append("image", picture, filename);
  form.append("type", "input");
  if (subfolder) form.append("subfolder", subfolder);
  if (overwrite) form.append("overwrite", "true");
  const answer = await fetch(api("/upload/image"), { method: "POST", body: form }).catch(() => null);
  if (!answer) throw new Error(`${filename} could not be uploaded: the server does not answer.`);
  if (answer.status === 413) throw new Error(`${filename} is larger than the server takes (--max-upload-size).`);
  if (!answer.ok) throw new Error(`${filename} could not be uploaded: the server answered ${answer.status}.`);
  const placed = (await answer.json()) as { name: string; subfolder: string };
  return placed.subfolder ? `${placed.subfolder}/${placed.name}` : placed.name;
}
