// viewer.html: the scene is in the page, as JSON; the page is the viewer.
import type { Mode } from "./looks";
import type { SceneObject } from "./model";
import { Viewer, type ViewState } from "./viewer";

/** Starts the viewer in a page that triptych/viewer/export.py wrote; elsewhere it does nothing. */
export function startPage(): void {
  const data = document.querySelector<HTMLScriptElement>("script#scene[type='application/json']");
  const host = document.getElementById("viewer");
  if (!data?.textContent || !host) return;
  const { objects } = JSON.parse(data.textContent) as { objects: SceneObject[] };
  const state = stateOf(new URLSearchParams(location.hash.slice(1)));
  const viewer = new Viewer(host, { state, globalKeys: true, onState: showBackground });
  viewer.fit();
  showBackground(viewer.state);
  Object.assign(window, { triptych: viewer });
  void viewer.show(objects.map(scene => ({ name: scene.name, scene }))).then(() => {
    document.documentElement.dataset.ready = "yes";
  });
}

function showBackground({ background }: ViewState): void {
  document.documentElement.dataset.background = background;
}

/** A link may choose what is shown: #mode=clay&azimuth=90&elevation=10&grid=0&background=light&object=1 */
function stateOf(link: URLSearchParams): Partial<ViewState> {
  const state: Partial<ViewState> = {};
  const number = (name: string): number | null => {
    const value = Number(link.get(name) ?? NaN);
    return Number.isFinite(value) ? value : null;
  };
  const mode = link.get("mode");
  if (mode) state.mode = mode as Mode;
  if (link.get("background") === "light") state.background = "light";
  if (link.has("grid")) state.grid = link.get("grid") !== "0";
  if (link.get("turn") === "1") state.turn = true;
  state.light = number("light") ?? -35;
  state.object = number("object") ?? 0;
  const [azimuth, elevation] = [number("azimuth"), number("elevation")];
  if (azimuth !== null || elevation !== null) {
    state.pose = { azimuth: azimuth ?? 30, elevation: elevation ?? 14, distance: 4, target: [0, 0, 0] };
  }
  return state;
}
