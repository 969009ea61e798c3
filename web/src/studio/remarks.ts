// What the nodes of a run say: warnings by themselves, the rest small. A run that fails has said something too.
import type { MeshOutput } from "../comfy/api";

/** All that these say is a warning. */
const WARN_ONLY = ["Triptych_PrepareViews", "Triptych_LoadFlux"];

export class Remarks {
  private readonly warnings = new Set<string>();
  private readonly texts = new Map<string, string[]>();

  constructor(private readonly list: HTMLElement, private readonly small: HTMLElement) {}

  /** Before a new run. */
  clear(): void {
    this.warnings.clear();
    this.texts.clear();
    this.show();
  }

  /** What a node shows; the same once more changes nothing. */
  add(node: string, classType: string | undefined, output: MeshOutput): void {
    const known = this.warnings.size;
    const lines = (output.text ?? []).flatMap(text => text.split("\n")).filter(Boolean);
    const warned = WARN_ONLY.includes(classType ?? "") ? lines : (output.triptych_views?.[0]?.warnings ?? []);
    for (const line of warned) this.warnings.add(line);
    this.texts.set(node, lines);
    this.show();
    if (this.warnings.size > known) this.list.scrollIntoView({ block: "nearest" });
  }

  private show(): void {
    const rest = [...this.texts.values()].flat().filter(line => !this.warnings.has(line));
    this.list.replaceChildren(...[...this.warnings].map(text => Object.assign(document.createElement("li"), { textContent: text })));
    this.list.hidden = this.warnings.size === 0;
    this.small.textContent = rest.join("\n");
    this.small.hidden = rest.length === 0;
  }
}
