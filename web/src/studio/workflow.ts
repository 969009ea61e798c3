// The graph that the studio queues, in ComfyUI's API form: one of workflows/, or this one where none was built in.
export interface GraphNode {
  class_type: string;
  inputs: Record<string, unknown>;
  _meta?: { title?: string };
}

export type Graph = Record<string, GraphNode>;

export const SIDES = ["front", "left", "back", "right"] as const;
export type Side = (typeof SIDES)[number];

export interface Settings {
  seed: number;
  steps: number;
  guidance: number;
  ensemble: number;
  texture_size: number;
  target_faces: number;
}

export const QUALITIES: Record<string, Omit<Settings, "seed" | "steps" | "guidance"> & { label: string }> = {
  quick: { label: "Quick", ensemble: 1, texture_size: 512, target_faces: 6000 },
  standard: { label: "Standard", ensemble: 4, texture_size: 1024, target_faces: 12000 },
  fine: { label: "Fine", ensemble: 8, texture_size: 2048, target_faces: 30000 },
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

const NEEDED = ["Triptych_PrepareViews", "Triptych_Reconstruct", "Triptych_ExportMesh"];

/** The workflow of workflows/ that fits the page (built into its folder), else the built-in one. */
export async function chooseWorkflow(): Promise<Graph> {
  const read = async <T>(name: string): Promise<T | null> => {
    const answer = await fetch(new URL(`workflows/${name}`, location.href)).catch(() => null);
    return answer?.ok ? ((await answer.json()) as T) : null;
  };
  for (const name of (await read<string[]>("index.json")) ?? []) {
    const graph = await read<Graph>(name);
    if (graph && fits(graph)) return graph;
  }
  return structuredClone(BUILT_IN);
}

function fits(graph: Graph): boolean {
  const classes = Object.values(graph).map(node => node.class_type);
  const views = find(graph, "Triptych_PrepareViews");
  const named = views !== undefined && SIDES.every(side => Array.isArray(graph[views]?.inputs[side]));
  return named && NEEDED.every(name => classes.includes(name));
}

function find(graph: Graph, classType: string): string | undefined {
  return Object.keys(graph).find(id => graph[id]?.class_type === classType);
}

/** The graph with these pictures (names in the input folder) and settings; views that are absent are taken out. */
export function fill(template: Graph, pictures: Partial<Record<Side, string>>, settings: Settings): Graph {
  const graph = structuredClone(template);
  const views = graph[find(graph, "Triptych_PrepareViews") ?? ""];
  if (!views) throw new Error("The workflow has no Prepare views node.");
  for (const side of SIDES) {
    const link = views.inputs[side];
    const loader = Array.isArray(link) ? String(link[0]) : null;
    const name = pictures[side];
    if (name && loader && graph[loader]) graph[loader].inputs.image = name;
    if (name) continue;
    delete views.inputs[side];
    delete views.inputs[`${side}_mask`];
    if (loader) delete graph[loader];
  }
  const { seed, steps, guidance, ensemble, texture_size, target_faces } = settings;
  set(graph, ["Triptych_Reconstruct"], { seed, steps, guidance, ensemble });
  set(graph, ["Triptych_TextureMesh", "Triptych_Reconstruct"], { texture_size });
  set(graph, ["Triptych_CleanMesh", "Triptych_Reconstruct"], { target_faces });
  return graph;
}

/** Sets inputs on the first of these node classes that the graph has. */
function set(graph: Graph, classes: string[], values: Record<string, number>): void {
  const id = classes.map(name => find(graph, name)).find(found => found !== undefined);
  const node = id === undefined ? undefined : graph[id];
  if (node) Object.assign(node.inputs, values);
}

const TITLES: Record<string, string> = {
  LoadImage: "Loading the pictures", Triptych_LoadBundle: "Loading the model", Triptych_PrepareViews: "Preparing the views",
  Triptych_Reconstruct: "Making the shape", Triptych_CleanMesh: "Cleaning the mesh", Triptych_TextureMesh: "Painting",
  Triptych_ExportMesh: "Writing the files", Triptych_Preview3D: "Preparing the view", Triptych_RenderViews: "Drawing pictures",
};

export function titleOf(graph: Graph | null, id: string): string {
  const node = graph?.[id];
  return node ? (TITLES[node.class_type] ?? node._meta?.title ?? node.class_type) : `Node ${id}`;
}
