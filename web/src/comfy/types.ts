// The part of ComfyUI's frontend that the extension touches.
export interface DomWidget {
  serialize?: boolean;
  computeLayoutSize?: () => { minHeight: number; minWidth: number };
}

export interface Widget {
  name: string;
  label?: string;
  serialize?: boolean;
  value: unknown;
  options?: { values?: unknown };
  callback?: (value: unknown) => void;
}

export interface ComfyNode {
  id: number | string;
  comfyClass?: string;
  type?: string;
  title?: string;
  pos: [number, number];
  size: [number, number];
  properties: Record<string, unknown>;
  widgets?: Widget[];
  graph?: { add(node: ComfyNode): void; getNodeById(id: number | string): ComfyNode | null; setDirtyCanvas?(front: boolean, back: boolean): void } | null;
  addWidget(type: string, name: string, value: unknown, callback: () => void, options: Record<string, unknown>): Widget;
  addDOMWidget(name: string, type: string, element: HTMLElement, options: Record<string, unknown>): DomWidget;
  removeWidget(widget: DomWidget): void;
  setSize(size: [number, number]): void;
  onExecuted?: (output: unknown) => void;
  onRemoved?: () => void;
  onConfigure?: (data: unknown) => void;
  onDragOver?: (event: DragEvent) => boolean;
  onDragDrop?: (event: DragEvent) => boolean;
}

export interface ComfyApp {
  registerExtension(extension: Record<string, unknown>): void;
  refreshComboInNodes?: () => Promise<void>;
  api?: { apiURL(path: string): string };
  extensionManager?: { setting?: { get(name: string): unknown } };
  ui?: { settings?: { getSettingValue?(name: string): unknown } };
}

declare global {
  interface Window {
    LiteGraph?: { createNode(type: string): ComfyNode | null; vueNodesMode?: boolean };
    app?: { canvas?: { graph?: unknown } };
  }
}
