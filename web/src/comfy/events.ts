// Listening to a node beside those who listen already.
import type { ComfyNode } from "./types";

/** Chains `more` behind what the node already does at that event. */
export function after<K extends "onExecuted" | "onRemoved" | "onConfigure">(node: ComfyNode, event: K, more: (value: unknown) => void): void {
  const before = node[event] as ((value?: unknown) => void) | undefined;
  node[event] = function (this: ComfyNode, value?: unknown) {
    before?.call(this, value);
    more(value);
  };
}
