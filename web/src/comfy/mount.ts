// A widget's element in Nodes 2.0: put into the node where the frontend leaves it out, and as high as the node has room.
//
// Up to frontend 1.27 Nodes 2.0 draw no DOM widgets at all. Later ones do, but give them no more than their least height
// (1.35), until a widget with a layout of its own gets the rest (1.58). Both are seen from the page, not from a version.
import type { ComfyNode } from "./types";

const BODY = "triptych-body";
const MARGIN = 12;
const HEIGHT = 320; // these nodes are as high as what is in them

interface Mount {
  node: ComfyNode;
  width: number;
  height: number | null;
}

const mounts = new Map<HTMLElement, Mount>();
let pending = 0;

/**
 * Watches over `host`, a DOM widget of `node`, which is `width` wide or wider, until the returned function is called.
 * `height` is that of a host which takes what room there is; null: it is as high as its content.
 */
export function keepInNode(node: ComfyNode, host: HTMLElement, width: number, height: number | null = HEIGHT): () => void {
  if (!mounts.size) start();
  mounts.set(host, { node, width, height });
  look();
  // Where the wheel may turn the graph, it turns the model or the text.
  host.dataset.captureWheel = "true";
  // The node would follow the pointer.
  host.addEventListener("pointerdown", event => event.stopPropagation());
  const sizes = new ResizeObserver(() => stretch(host));
  if (height !== null) sizes.observe(host);
  return () => {
    sizes.disconnect();
    mounts.delete(host);
    host.closest(`.${BODY}`)?.remove();
    if (!mounts.size) changes.disconnect();
  };
}

const changes = new MutationObserver(look);

function look(): void {
  pending ||= requestAnimationFrame(() => {
    pending = 0;
    for (const [host, mount] of mounts) place(host, mount);
    // The frontend took its widget after all.
    for (const box of document.querySelectorAll(`.${BODY}:empty`)) box.remove();
  });
}

function start(): void {
  changes.observe(document.body, { childList: true, subtree: true });
  window.addEventListener("wheel", wheelToModel, { capture: true, passive: false });
}

function place(host: HTMLElement, { node, width, height }: Mount): void {
  if (host.isConnected || !window.LiteGraph?.vueNodesMode) return;
  const body = document.querySelector(`[data-testid="node-body-${CSS.escape(String(node.id))}"]`);
  if (!body || !isShown(node)) return;
  const box = document.createElement("div");
  box.className = BODY;
  Object.assign(box.style, {
    width: `${Math.max(node.size[0], width) - 2 * MARGIN}px`, height: height === null ? "auto" : `${height}px`, margin: `0 ${MARGIN}px`,
  });
  box.append(host);
  body.append(box);
}

/** Ids are those of a graph: a node inside a subgraph may have the number of one that is drawn. */
function isShown(node: ComfyNode): boolean {
  const drawn = window.app?.canvas?.graph;
  return !drawn || drawn === node.graph;
}

/** Gives the row of `host` what the node's other widgets leave. */
function stretch(host: HTMLElement): void {
  const grid = host.closest<HTMLElement>(".lg-node-widgets");
  if (!grid || getComputedStyle(grid).display !== "grid") return;
  const rows = [...grid.children].map(row => (row.contains(host) ? "auto" : "min-content")).join(" ");
  if (grid.style.gridTemplateRows !== rows) grid.style.gridTemplateRows = rows;
}

/** These frontends send the wheel to the graph before any element sees it. */
function wheelToModel(event: WheelEvent): void {
  const path = event.composedPath();
  if (!path.some(part => part instanceof Element && part.className === BODY)) return;
  // A text scrolls by itself.
  if (path[0] instanceof HTMLTextAreaElement) return event.stopPropagation();
  event.preventDefault();
  event.stopPropagation();
  // It stays inside the viewer's shadow root.
  const { clientX, clientY, deltaX, deltaY, deltaMode } = event;
  path[0]?.dispatchEvent(new WheelEvent("wheel", { clientX, clientY, deltaX, deltaY, deltaMode, bubbles: true, cancelable: true }));
}
