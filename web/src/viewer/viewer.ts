// The viewer: a canvas with its controls, in a shadow root, for the node widget, the studio page and viewer.html alike.
import { Box3, Sphere, Vector3 } from "three";
import { fitDistance, Orbit, type Pose } from "./camera";
import { listenToKeys, listenToPointers, type Commands } from "./input";
import { load, type Source } from "./load";
import { forgetLooks, MODES, obstacle, type Mode } from "./looks";
import type { Format, Model } from "./model";
import { buildPanel, type Panel } from "./panel";
import { download } from "./save";
import { Stage, type Shot } from "./stage";
import { wordsFor, type Words } from "./words";

/** Everything that a graph or a page keeps; plain JSON. */
export interface ViewState {
  mode: Mode;
  light: number;
  turn: boolean;
  grid: boolean;
  background: "dark" | "light";
  pose: Pose;
  /** Which source is shown, and with which one it is compared (null: no comparison). */
  object: number;
  against: number | null;
  split: number;
}

export interface ViewerOptions {
  language?: string;
  state?: Partial<ViewState>;
  /** Called after the user changed something. */
  onState?: (state: ViewState) => void;
  /** Puts a picture where a graph can load it; returns a sentence that says where. Its button is absent without. */
  toInput?: (picture: Blob) => Promise<string>;
  /** Keys work anywhere on the page, not only when the viewer has the focus. */
  globalKeys?: boolean;
}

const START: ViewState = {
  mode: "shaded", light: -35, turn: false, grid: true, background: "dark",
  pose: { azimuth: 30, elevation: 14, distance: fitDistance(1), target: [0, 0, 0] }, object: 0, against: null, split: 0.5,
};

export class Viewer {
  readonly state: ViewState;
  readonly words: Words;
  private readonly orbit = new Orbit();
  private readonly panel: Panel;
  private readonly canvas: HTMLCanvasElement;
  private stage: Stage | null = null;
  private sources: Source[] = [];
  private readonly models = new Map<number, Model>();
  private generation = 0;
  private visible = true;
  private pending = 0;
  private lastTime = 0;
  private fitted = true;
  private disposed = false;
  private readonly endings: (() => void)[] = [];

  constructor(readonly host: HTMLElement, private readonly options: ViewerOptions = {}) {
    this.state = { ...structuredClone(START), ...structuredClone(options.state ?? {}) };
    if (!MODES.includes(this.state.mode)) this.state.mode = "shaded";
    if (options.state?.pose) this.fitted = false;
    this.orbit.pose = this.state.pose;
    this.words = wordsFor(options.language ?? document.documentElement.lang);
    const commands = this.commands();
    this.panel = buildPanel(host, this, commands, options.toInput !== undefined);
    this.canvas = this.panel.canvas;
    listenToPointers(this.canvas, commands, () => { if (this.state.turn) this.set({ turn: false }); });
    this.endings.push(listenToKeys(options.globalKeys ? document : this.panel.root, commands));
    const sizes = new ResizeObserver(() => { if (this.fitted) this.fit(); else this.refresh(); });
    sizes.observe(host);
    const sight = new IntersectionObserver(([entry]) => {
      this.visible = entry?.isIntersecting ?? true;
      this.refresh();
    });
    sight.observe(host);
    this.endings.push(() => sizes.disconnect(), () => sight.disconnect());
    this.panel.update();
  }

  get shown(): Source | null {
    return this.sources[this.state.object] ?? null;
  }

  get all(): readonly Source[] {
    return this.sources;
  }

  get model(): Model | null {
    return this.models.get(this.state.object) ?? null;
  }

  get other(): Model | null {
    return this.state.against === null ? null : (this.models.get(this.state.against) ?? null);
  }

  /** Shows these objects in place of what was there. Resolves when the first is drawn; a failure becomes a sentence. */
  async show(sources: Source[]): Promise<void> {
    this.generation++;
    this.clear();
    this.sources = sources;
    if (this.state.object >= sources.length) this.state.object = 0;
    if (this.state.against !== null && this.state.against >= sources.length) this.state.against = null;
    await this.bring();
  }

  /** Changes part of the state and draws; the owner is told. */
  set(change: Partial<ViewState>): void {
    Object.assign(this.state, change);
    this.orbit.pose = this.state.pose;
    if ("turn" in change) this.lastTime = 0;
    const moved = "object" in change || "against" in change;
    this.panel.update();
    if (moved) void this.bring();
    this.refresh();
    this.options.onState?.(structuredClone(this.state));
  }

  /** Takes over a stored state, without telling the owner. */
  restore(state: Partial<ViewState>): void {
    Object.assign(this.state, structuredClone(state));
    this.orbit.pose = this.state.pose;
    if (state.pose) this.fitted = false;
    this.panel.update();
    this.refresh();
  }

  fit(): void {
    this.fitted = true;
    const { clientWidth, clientHeight } = this.canvas;
    this.state.pose.distance = fitDistance(clientWidth / Math.max(1, clientHeight), this.panel.covered());
    this.state.pose.target = [0, 0, 0];
    this.refresh();
  }

  tell(sentence: string): void {
    this.panel.message(sentence);
  }

  note(sentence: string): void {
    this.panel.note(sentence);
  }

  /** The view as it is, as PNG; `transparent` leaves grid and background out. */
  async picture(width?: number, height?: number, transparent = false): Promise<Blob> {
    const shot = this.shot();
    if (!shot) throw new Error("There is nothing to take a picture of yet.");
    const canvas = document.createElement("canvas");
    const size = { width: width ?? shot.width, height: height ?? shot.height };
    shot.camera = this.orbit.place(shot.frame.centre, shot.frame.radius, size.width / size.height, 0);
    this.stage?.draw({ ...shot, ...size, ...(transparent ? { grid: false, background: "none" as const } : {}) }, canvas);
    const blob = await new Promise<Blob | null>(done => canvas.toBlob(done, "image/png"));
    if (!blob) throw new Error("The browser could not make a picture of the view.");
    return blob;
  }

  async save(format: Format): Promise<void> {
    const { model, shown } = this;
    if (!model || !shown) return;
    await this.attempt(async () => {
      const { name, blob } = await download(model, shown, format);
      offer(name, blob);
    });
  }

  dispose(): void {
    this.disposed = true;
    this.generation++;
    cancelAnimationFrame(this.pending);
    for (const end of this.endings) end();
    this.clear();
    this.panel.remove();
  }

  /** Asks for a frame; nothing is drawn while the view cannot be seen. */
  refresh(): void {
    if (this.pending || this.disposed || !this.visible || !this.model) return;
    this.pending = requestAnimationFrame(time => {
      this.pending = 0;
      if (this.state.turn && this.lastTime) this.orbit.turn(-Math.min(0.1, (time - this.lastTime) / 1000) * 30, 0);
      this.lastTime = time;
      this.draw();
      if (this.state.turn) this.refresh();
    });
  }

  /** Draws now. */
  draw(): void {
    const shot = this.shot();
    if (!shot || !this.stage || !this.canvas.isConnected) return;
    this.stage.draw(shot, this.canvas);
    this.canvas.dataset.drawn = String(Number(this.canvas.dataset.drawn ?? 0) + 1);
  }

  private shot(): Shot | null {
    const { model, other, state, canvas } = this;
    if (!model) return null;
    const scale = Math.min(window.devicePixelRatio || 1, 2);
    const [width, height] = [Math.round(canvas.clientWidth * scale), Math.round(canvas.clientHeight * scale)];
    if (width < 1 || height < 1) return null;
    const frame = other ? frameOf([model, other]) : model;
    return {
      width, height, models: other ? [model, other] : [model], split: state.split, frame,
      camera: this.orbit.place(frame.centre, frame.radius, width / height, this.panel.covered()),
      mode: state.mode, light: state.light, grid: state.grid, background: state.background,
    };
  }

  /** Loads what the state asks for. */
  private async bring(): Promise<void> {
    const generation = this.generation;
    const wanted = [this.state.object, this.state.against].filter(index => index !== null);
    if (this.sources.length === 0) return;
    const missing = wanted.filter(index => !this.models.has(index));
    if (missing.length) this.panel.loading(true);
    try {
      this.stage ??= this.connect();
      for (const index of missing) {
        const source = this.sources[index];
        if (!source) continue;
        const model = await load(source);
        if (generation !== this.generation) return model.dispose();
        if (this.models.has(index)) model.dispose();
        else this.models.set(index, model);
      }
      this.panel.message("");
    } catch (error) {
      if (generation === this.generation) this.panel.message(error instanceof Error ? error.message : String(error));
      return;
    } finally {
      if (generation === this.generation) this.panel.loading(false);
    }
    if (this.model && obstacle(this.model, this.state.mode)) this.state.mode = "shaded";
    this.panel.update();
    if (this.fitted) this.fit();
    this.draw();
    this.refresh();
    this.host.dataset.ready = "yes";
  }

  private connect(): Stage {
    const stage = Stage.get();
    this.endings.push(stage.onRestored(() => this.refresh()));
    return stage;
  }

  private clear(): void {
    delete this.host.dataset.ready;
    for (const model of this.models.values()) {
      model.parts.forEach(forgetLooks);
      model.dispose();
    }
    this.models.clear();
  }

  private async attempt(work: () => Promise<unknown>): Promise<void> {
    try {
      await work();
    } catch (error) {
      this.note(error instanceof Error ? error.message : String(error));
    }
  }

  private commands(): Commands {
    const change = (move: () => void): void => {
      move();
      this.fitted = false;
      this.refresh();
      this.options.onState?.(structuredClone(this.state));
    };
    return {
      turn: (azimuth, elevation) => {
        this.orbit.turn(azimuth, elevation);
        this.set({});
      },
      pan: (dx, dy) => change(() => this.orbit.pan(dx, dy)),
      zoom: factor => change(() => this.orbit.zoom(factor)),
      fit: () => { this.fit(); this.set({}); },
      look: azimuth => this.set({ turn: false, pose: { ...this.state.pose, azimuth, elevation: 0 } }),
      nextMode: () => {
        const { model } = this;
        const open = MODES.filter(mode => !model || !obstacle(model, mode));
        this.set({ mode: open[(open.indexOf(this.state.mode) + 1) % open.length] ?? "shaded" });
      },
      toggle: what => {
        const { state } = this;
        if (what === "background") this.set({ background: state.background === "dark" ? "light" : "dark" });
        else if (what !== "compare") this.set({ [what]: !state[what] });
        else if (this.sources.length > 1) {
          this.set({ against: state.against === null ? (state.object + 1) % this.sources.length : null });
        }
      },
      light: degrees => this.set({ light: ((this.state.light + degrees + 540) % 360) - 180 }),
      picture: () => void this.attempt(async () => offer(`${this.shown?.name ?? "picture"}.png`, await this.picture())),
    };
  }

  /** The "picture to input" button. */
  async sendPicture(): Promise<void> {
    const { toInput } = this.options;
    if (toInput) await this.attempt(async () => this.note(await toInput(await this.picture(1024, 1024, true))));
  }
}

function frameOf(models: Model[]): { bounds: Box3; centre: Vector3; radius: number } {
  const bounds = new Box3();
  for (const model of models) bounds.union(model.bounds);
  const sphere = bounds.getBoundingSphere(new Sphere());
  return { bounds, centre: sphere.center, radius: sphere.radius || 1 };
}

export function offer(name: string, blob: Blob): void {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}
