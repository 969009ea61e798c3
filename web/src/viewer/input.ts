// Pointer, touch and keyboard on a view.
export interface Commands {
  turn(azimuth: number, elevation: number): void;
  pan(dx: number, dy: number): void;
  zoom(factor: number): void;
  fit(): void;
  look(azimuth: number): void;
  nextMode(): void;
  toggle(what: "turn" | "grid" | "background" | "compare"): void;
  light(degrees: number): void;
  picture(): void;
}

export function listenToPointers(canvas: HTMLCanvasElement, act: Commands, onStart: () => void): void {
  const pointers = new Map<number, { x: number; y: number }>();
  // A graph node may be drawn scaled: a drag is measured in the view's own pixels.
  const scale = (): number => canvas.clientHeight / Math.max(1, canvas.getBoundingClientRect().height);
  const spread = (): [number, number, number] => {
    const [a, b] = [...pointers.values()] as [{ x: number; y: number }, { x: number; y: number }];
    return [Math.hypot(a.x - b.x, a.y - b.y) || 1, (a.x + b.x) / 2, (a.y + b.y) / 2];
  };
  const pan = (dx: number, dy: number): void => act.pan(dx / canvas.clientHeight, dy / canvas.clientHeight);
  canvas.addEventListener("pointerdown", event => {
    event.stopPropagation();
    canvas.focus({ preventScroll: true });
    capture(canvas, event.pointerId);
    pointers.set(event.pointerId, { x: event.clientX, y: event.clientY });
    canvas.classList.add("dragging");
    onStart();
  });
  canvas.addEventListener("pointermove", event => {
    const last = pointers.get(event.pointerId);
    if (!last) return;
    event.stopPropagation();
    const before = pointers.size === 2 ? spread() : null;
    const [dx, dy] = [(event.clientX - last.x) * scale(), (event.clientY - last.y) * scale()];
    pointers.set(event.pointerId, { x: event.clientX, y: event.clientY });
    if (before) {
      const after = spread();
      act.zoom(before[0] / after[0]);
      pan((after[1] - before[1]) * scale(), (after[2] - before[2]) * scale());
    } else if (event.shiftKey || event.buttons & 6) pan(dx, dy);
    else act.turn(dx * 0.4, dy * 0.4);
  });
  const release = (event: PointerEvent): void => {
    pointers.delete(event.pointerId);
    if (!pointers.size) canvas.classList.remove("dragging");
  };
  canvas.addEventListener("pointerup", release);
  canvas.addEventListener("pointercancel", release);
  canvas.addEventListener("contextmenu", event => { event.preventDefault(); event.stopPropagation(); });
  canvas.addEventListener("dblclick", event => { event.stopPropagation(); act.fit(); });
  canvas.addEventListener("wheel", event => {
    event.preventDefault();
    event.stopPropagation();
    const step = Math.max(-60, Math.min(60, event.deltaY * (event.deltaMode ? 16 : 1)));
    act.zoom(Math.exp(step * 0.004));
  }, { passive: false });
}

/** A pointer that already ended cannot be captured; then there is nothing to follow. */
export function capture(element: Element, pointerId: number): void {
  try {
    element.setPointerCapture(pointerId);
  } catch (error) {
    if (!(error instanceof DOMException)) throw error;
  }
}

export function listenToKeys(target: EventTarget, act: Commands): () => void {
  const arrow = (x: number, y: number) => (shift: boolean): void =>
    shift ? act.pan(x * 0.05, y * 0.05) : act.turn(x * 6, -y * 6);
  const keys: Record<string, (shift: boolean) => void> = {
    ArrowLeft: arrow(1, 0), ArrowRight: arrow(-1, 0), ArrowUp: arrow(0, -1), ArrowDown: arrow(0, 1),
    "+": () => act.zoom(0.88), "=": () => act.zoom(0.88), "-": () => act.zoom(1 / 0.88),
    f: () => act.fit(), m: () => act.nextMode(), s: () => act.picture(),
    t: () => act.toggle("turn"), g: () => act.toggle("grid"), b: () => act.toggle("background"), c: () => act.toggle("compare"),
    "[": () => act.light(-10), "]": () => act.light(10),
    1: () => act.look(0), 2: () => act.look(90), 3: () => act.look(180), 4: () => act.look(270),
  };
  const listen = (event: Event): void => {
    const { key, ctrlKey, metaKey, altKey, shiftKey } = event as KeyboardEvent;
    const origin = event.composedPath()[0] as Element;
    if (ctrlKey || metaKey || altKey || /^(INPUT|SELECT|TEXTAREA)$/.test(origin.tagName ?? "")) return;
    if (origin.getAttribute?.("role") === "slider" && key.startsWith("Arrow")) return;
    const act = keys[key.length === 1 ? key.toLowerCase() : key];
    if (!act) return;
    // Else ComfyUI would take "c" or "b" for its own shortcut.
    event.preventDefault();
    event.stopPropagation();
    act(shiftKey);
  };
  target.addEventListener("keydown", listen);
  return () => target.removeEventListener("keydown", listen);
}
