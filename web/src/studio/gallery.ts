// Earlier results: what /history knows, and after a restart of the server the mesh files in its output folder.
import { sourcesOf, viewUrl, type FileEntry, type MakeUrl, type MeshOutput } from "../comfy/api";
import { formatOf, Viewer, type Source } from "../viewer/index";
import type { HistoryEntry } from "./jobs";

const CLOSE = 3.1; // in radii of the object: most objects fill less than their sphere

export interface Result {
  key: string;
  label: string;
  /** Where to take the model from, the best first: a preview in the temporary folder may be gone. */
  sources: Source[];
}

interface ListedResult extends FileEntry {
  modified: number;
  files: FileEntry[];
}

/** The result of a finished job, or null when it made no mesh. */
export function resultOf(id: string, entry: HistoryEntry, api: MakeUrl): Result | null {
  const graph = entry.prompt[2];
  const made = Object.entries(entry.outputs).filter(([node]) => graph[node]?.class_type.startsWith("Triptych_"));
  const of = (name: string): Source[] => made.filter(([node]) => graph[node]?.class_type === name).flatMap(([, output]) => sourcesOf(output, api));
  const [exported, previewed] = [of("Triptych_ExportMesh"), of("Triptych_Preview3D")];
  const files = Object.assign({}, ...exported.map(source => source.files)) as Source["files"];
  const name = exported[0]?.name ?? previewed[0]?.name;
  if (!name) return null;
  const sources = [...previewed.slice(0, 1), ...exported].map(source => ({ ...source, name, files: { ...source.files, ...files } }));
  return { key: exported[0]?.url ?? id, label: name, sources };
}

/** Mesh files below the output folder, newest first; empty where the server does not tell. */
export async function listedResults(api: MakeUrl): Promise<Result[]> {
  const answer = await fetch(api("/triptych/results?limit=40")).catch(() => null);
  if (!answer?.ok) return [];
  const { results } = (await answer.json()) as { results: ListedResult[] };
  return results.map(result => {
    const output: MeshOutput = { "3d": [result], files: result.files.filter(file => formatOf(file.filename) === null) };
    return { key: viewUrl(api, result), label: result.filename, sources: sourcesOf(output, api) };
  });
}

/** Draws small pictures of models one after another, in one view that is never seen. */
export class Thumbnails {
  private readonly viewer: Viewer;
  private readonly known = new Map<string, Promise<string | null>>();
  private last: Promise<unknown> = Promise.resolve();

  constructor() {
    const host = document.createElement("div");
    host.inert = true;
    host.setAttribute("aria-hidden", "true");
    Object.assign(host.style, { position: "fixed", left: "-400px", top: "0", width: "264px", height: "264px" });
    document.body.append(host);
    this.viewer = new Viewer(host, { state: { grid: false } });
  }

  /** The address of a picture, or null when no source can be shown. */
  of(result: Result): Promise<string | null> {
    const known = this.known.get(result.key);
    if (known) return known;
    const made = this.last.then(async () => {
      for (const source of result.sources) {
        await this.viewer.show([source]);
        this.viewer.state.pose.distance = CLOSE;
        if (this.viewer.model) return URL.createObjectURL(await this.viewer.picture(264, 264, true));
      }
      return null;
    });
    this.last = made.catch(() => null);
    this.known.set(result.key, made);
    return made;
  }
}
