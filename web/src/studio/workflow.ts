// The graph that the studio queues, in ComfyUI's API form: one of workflows/, or this one where none was built in.
import { words } from "./words";

export interface GraphNode {
  class_type: string;
  inputs: Record<string, unknown>;
  _meta?: { title?: string };
}

export type Graph = Record<string, GraphNode>;

export const SIDES = ["front", "left", "back", "right"] as const;
export type Side = (typeof SIDES)[number];

/** What the page makes a mesh from: pictures alone, pictures and drawn sides, or a sentence alone. */
export type Kind = "views" | "photo" | "text";

export interface Source {
  kind: Kind;
  /** Names in ComfyUI's input folder. */
  pictures: Partial<Record<Side, string>>;
  sentence: string;
}

export interface Settings {
  seed: number;
  steps: number;
  guidance: number;
  ensemble: number;
  texture_size: number;
  target_faces: number;
  view_seed: number;
  view_steps: number;
  view_guidance: number;
  view_rerolls: number;
}

/** view_steps 0: the model's own number, at which it was tuned; more are not better with every model. */
export type Quality = Pick<Settings, "ensemble" | "texture_size" | "target_faces" | "view_steps" | "view_rerolls">;

export const QUALITIES: Record<"quick" | "standard" | "fine", Quality> = {
  quick: { ensemble: 1, texture_size: 512, target_faces: 6000, view_steps: 0, view_rerolls: 0 },
  standard: { ensemble: 4, texture_size: 1024, target_faces: 12000, view_steps: 0, view_rerolls: 2 },
  fine: { ensemble: 8, texture_size: 2048, target_faces: 30000, view_steps: 0, view_rerolls: 4 },
};

// The mesh is reduced and painted after the reconstruction, so that a change of either leaves the longest part cached.
const BUILT_IN: Graph = {
  bundle: { class_type: "Triptych_LoadBundle", inputs: { name: "triptych-tiny", repository: "" } },
  ...Object.fromEntries(SIDES.map(side => [side, { class_type: "LoadImage", inputs: { image: "" } }])),
  views: {
    class_type: "Triptych_PrepareViews",
    inputs: {
      ...Object.fromEntries(SIDES.flatMap(side => [[side, [side, 0]], [`${side}_mask`, [side, 1]]])),
      layout: "auto", size: 512, foreground: "auto", mask_shows: "auto",
    },
  },
  make: {
    class_type: "Triptych_Reconstruct",
    inputs: {
      bundle: ["bundle", 0], views: ["views", 0], seed: 0, steps: 0, guidance: -1, ensemble: 4, texture_size: 0,
      target_faces: 0, keep_silhouettes: true,
    },
  },
  reduce: {
    class_type: "Triptych_CleanMesh",
    inputs: {
      mesh: ["make", 0], weld: true, weld_distance: 0, min_part: 0.01, fill_holes: 64, remesh: "none", remesh_resolution: 96,
      smooth: 0, target_faces: 12000,
    },
  },
  paint: {
    class_type: "Triptych_TextureMesh",
    inputs: {
      mesh: ["reduce", 0], views: ["views", 0], source: "auto", texture_size: 1024, unwrap: "where needed", fill: "diffuse",
      fit_to_views: false, padding: 3,
    },
  },
  export: { class_type: "Triptych_ExportMesh", inputs: { mesh: ["paint", 0], filename_prefix: "mesh/Triptych", file_format: "obj" } },
  show: { class_type: "Triptych_Preview3D", inputs: { mesh: ["paint", 0] } },
};

const NEEDED = ["Triptych_Reconstruct", "Triptych_ExportMesh"];
const DRAWING = "Triptych_FluxViews";
const SHEET_NODE = "triptych_sheet";

/** The workflow of workflows/ that fits the source (built into the page's folder), else the built-in one for pictures. */
export async function chooseWorkflow(kind: Kind): Promise<Graph> {
  const read = async <T>(name: string): Promise<T | null> => {
    const answer = await fetch(new URL(`workflows/${name}`, location.href)).catch(() => null);
    return answer?.ok ? ((await answer.json()) as T) : null;
  };
  for (const name of (await read<string[]>("index.json")) ?? []) {
    const graph = await read<Graph>(name);
    if (graph && kindOf(graph) === kind) return graph;
  }
  if (kind !== "views") throw new Error(words.noWorkflow);
  return structuredClone(BUILT_IN);
}

function kindOf(graph: Graph): Kind | null {
  const classes = Object.values(graph).map(node => node.class_type);
  if (!NEEDED.every(name => classes.includes(name))) return null;
  const linked = (classType: string): number => {
    const id = find(graph, classType);
    return id === undefined ? -1 : SIDES.filter(side => Array.isArray(graph[id]?.inputs[side])).length;
  };
  if (linked(DRAWING) >= 0) return linked(DRAWING) > 0 ? "photo" : "text";
  return linked("Triptych_PrepareViews") === SIDES.length ? "views" : null;
}

function find(graph: Graph, classType: string): string | undefined {
  return Object.keys(graph).find(id => graph[id]?.class_type === classType);
}

/** The graph with this source and these settings; views that are absent are taken out, loaders that lack are added. */
export function fill(template: Graph, source: Source, settings: Settings): Graph {
  const graph = structuredClone(template);
  const views = graph[find(graph, source.kind === "views" ? "Triptych_PrepareViews" : DRAWING) ?? ""];
  if (!views) throw new Error(words.noWorkflow);
  for (const side of SIDES) {
    const link = views.inputs[side];
    const loader = Array.isArray(link) ? String(link[0]) : `triptych_${side}`;
    const image = source.pictures[side];
    if (image) {
      graph[loader] = { class_type: "LoadImage", inputs: { image }, _meta: graph[loader]?._meta ?? { title: side } };
      Object.assign(views.inputs, { [side]: [loader, 0], [`${side}_mask`]: [loader, 1] });
    } else {
      delete views.inputs[side];
      delete views.inputs[`${side}_mask`];
      delete graph[loader];
    }
  }
  const { seed, steps, guidance, ensemble, texture_size, target_faces } = settings;
  set(graph, [DRAWING], {
    prompt: source.sentence, seed: settings.view_seed, steps: settings.view_steps, guidance: settings.view_guidance,
    rerolls: settings.view_rerolls,
  });
  set(graph, ["Triptych_Reconstruct"], { seed, steps, guidance, ensemble });
  set(graph, ["Triptych_TextureMesh", "Triptych_Reconstruct"], { texture_size });
  set(graph, ["Triptych_CleanMesh", "Triptych_Reconstruct"], { target_faces });
  return graph;
}

/** The same graph with a node that shows the drawn sheet, and that node: all that a new draw of the views has to run. The
 * rest stays in the graph, so that ComfyUI keeps what it has cached of it. */
export function viewsOnly(graph: Graph): { graph: Graph; target: string } {
  const id = find(graph, DRAWING);
  if (id === undefined) throw new Error(words.noWorkflow);
  const show: GraphNode = { class_type: "PreviewImage", inputs: { images: [id, 1] } };
  return { graph: { ...graph, [SHEET_NODE]: show }, target: SHEET_NODE };
}

/** Sets inputs on the first of these node classes that the graph has. */
function set(graph: Graph, classes: string[], values: Record<string, number | string>): void {
  const id = classes.map(name => find(graph, name)).find(found => found !== undefined);
  const node = id === undefined ? undefined : graph[id];
  if (node) Object.assign(node.inputs, values);
}

export function titleOf(graph: Graph | null, id: string): string {
  const node = graph?.[id];
  return node ? (words.stages[node.class_type] ?? node._meta?.title ?? node.class_type) : `${words.node} ${id}`;
}
