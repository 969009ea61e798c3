// What a node says: the sizes, warnings and numbers of its last run, as text to read and copy inside the node.
//
// ComfyUI's frontend shows such text for its own Preview Any only. The widget is there only while there is text, so that
// a node without any keeps its size; it is the last one and not serialised, so that no other value changes its place.
import { after } from "./events";
import { keepInNode } from "./mount";
import type { ComfyNode, DomWidget } from "./types";
import type { Words } from "./words";

const LAST_TEXT = "Triptych last text";
const LINE = 15; // px, as are those below
const COLUMN = 6.7; // a character at FONT
const FONT = "11px";
const PADDING = 12;
const MARGIN = 10; // the frontend's, around a DOM widget
const MOST_LINES = 10; // more of them scroll
const LEAST_WIDTH = 200;
const WIDE = /[\u1100-\u11ff\u2e80-\uffdc]/g; // as wide as two

export class NodeText {
  private readonly area = document.createElement("textarea");
  private widget: DomWidget | null = null;
  private release: (() => void) | null = null;

  constructor(private readonly node: ComfyNode, words: Words) {
    this.area.className = "comfy-multiline-input triptych-text";
    this.area.readOnly = true;
    this.area.rows = 1;
    this.area.setAttribute("aria-label", words.said);
    Object.assign(this.area.style, {
      width: "100%", height: "100%", boxSizing: "border-box", padding: `${PADDING / 2}px 8px`, resize: "none",
      font: `${FONT}/${LINE}px monospace`, whiteSpace: "pre-wrap", overflowY: "auto", borderRadius: "6px",
    });
    after(node, "onExecuted", output => {
      const text = textOf(output);
      if (text) node.properties[LAST_TEXT] = text;
      else delete node.properties[LAST_TEXT];
      this.say(text);
    });
    // A graph that is opened, pasted or undone brings its size along with its properties.
    after(node, "onConfigure", () => this.put((node.properties[LAST_TEXT] as string | undefined) ?? ""));
    after(node, "onRemoved", () => this.release?.());
  }

  /** Shows a text until the next one, without keeping it in the graph; none hides the widget. */
  say(text: string): void {
    const before = this.height;
    this.put(text);
    // What else is in the node keeps its room.
    const { node } = this;
    if (this.height !== before) node.setSize([node.size[0], node.size[1] + this.height - before]);
  }

  private put(text: string): void {
    this.area.value = text;
    if (text && !this.widget) this.add();
    if (!text && this.widget) this.remove();
    this.area.style.minHeight = `${this.height - 2 * MARGIN}px`;
    this.node.graph?.setDirtyCanvas?.(true, true);
  }

  /** What the widget takes of the node's height. */
  private get height(): number {
    if (!this.widget) return 0;
    const columns = Math.max(10, Math.floor((this.node.size[0] - 2 * MARGIN - 24) / COLUMN));
    const lines = this.area.value.split("\n").reduce((sum, line) => sum + Math.max(1, Math.ceil(columnsOf(line) / columns)), 0);
    return Math.min(lines, MOST_LINES) * LINE + PADDING + 2 * MARGIN;
  }

  private add(): void {
    const height = (): number => this.height;
    this.widget = this.node.addDOMWidget("triptych_text", "triptych_text", this.area, {
      serialize: false,
      hideOnZoom: false,
      getMinHeight: height,
      getMaxHeight: height,
      getValue: () => "",
      setValue: () => undefined,
    });
    this.widget.serialize = false;
    this.release = keepInNode(this.node, this.area, LEAST_WIDTH, null);
  }

  private remove(): void {
    this.release?.();
    if (this.widget) this.node.removeWidget(this.widget);
    this.widget = this.release = null;
  }
}

/** The text of a node's UI output; empty when it has none. */
function textOf(output: unknown): string {
  const text = (output as { text?: unknown } | null)?.text;
  return (Array.isArray(text) ? text : [text]).filter(part => typeof part === "string").join("\n").trim();
}

function columnsOf(line: string): number {
  return line.length + (line.match(WIDE)?.length ?? 0);
}
