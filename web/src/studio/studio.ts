// The studio page: a client of ComfyUI's public API with one workflow.
import { uploadImage } from "../comfy/api";
import { Viewer } from "../viewer/index";
import { listedResults, resultOf, Thumbnails, type Result } from "./gallery";
import { Jobs } from "./jobs";
import { Slots } from "./slots";
import { chooseWorkflow, fill, QUALITIES, SIDES, type Graph, type Settings, type Side } from "./workflow";

// The page lies at /extensions/<folder>/studio.html, wherever a proxy puts that.
const api = (path: string): string => new URL(`../..${path.startsWith("/ws") ? "" : "/api"}${path}`, location.href).href;
const $ = <T extends HTMLElement>(id: string): T => document.getElementById(id) as T;
const field = (id: string): HTMLInputElement => $<HTMLInputElement>(id);
const RUNNING = "triptych.job";

let shownPicture = "";
let running: string | null = null;
let results: Result[] = [];
let shown: Result | null = null;

const viewer = new Viewer($("viewer"), { toInput: async picture => `The picture is in ComfyUI's input folder as ${await uploadImage(api, picture, `triptych_${Date.now()}.png`, "triptych")}.` });
const thumbnails = new Thumbnails();
const slots = new Slots($("slots"), fail);
const jobs = new Jobs(api, {
  progress(stage, fraction) {
    $("stage").textContent = fraction === null ? `${stage} …` : `${stage}: ${Math.round(fraction * 100)} %`;
    const bar = $<HTMLProgressElement>("bar");
    if (fraction === null) bar.removeAttribute("value");
    else bar.value = fraction;
  },
  picture(image) {
    URL.revokeObjectURL(shownPicture);
    shownPicture = URL.createObjectURL(image);
    $("preview").querySelector("img")!.src = shownPicture;
    $("preview").hidden = false;
  },
  server(sentence) { $("server").textContent = sentence; },
});

function fail(sentence: string): void {
  $("error").textContent = sentence;
  $("error").hidden = !sentence;
  if (sentence) $("error").scrollIntoView({ block: "nearest" });
}

function settings(): Settings {
  const number = (id: string): number => Number(field(id).value);
  return {
    seed: number("seed"), steps: number("steps"), guidance: number("guidance"), texture_size: number("texture_size"),
    target_faces: Math.round(number("target_faces")), ensemble: QUALITIES[field("quality").value]?.ensemble ?? 4,
  };
}

/** A name made of the content: the same picture is the same input, and ComfyUI's cache holds. */
async function upload(side: Side, file: File): Promise<string> {
  const bytes = new Uint8Array(await file.arrayBuffer());
  let name = `${file.size}_${file.lastModified}`;
  // Only pages of https or of this machine may use SubtleCrypto.
  if (globalThis.crypto?.subtle) {
    name = [...new Uint8Array(await crypto.subtle.digest("SHA-256", bytes))].slice(0, 12).map(byte => byte.toString(16).padStart(2, "0")).join("");
  }
  const suffix = /\.\w{2,5}$/.exec(file.name)?.[0].toLowerCase() ?? ".png";
  return uploadImage(api, file, `${side}_${name}${suffix}`, "triptych");
}

async function make(): Promise<void> {
  fail("");
  const chosen = SIDES.filter(side => slots.files[side]);
  if (!chosen.length) return fail("Put in at least one picture of the object first.");
  busy(true, "Sending the pictures");
  try {
    const pictures: Partial<Record<Side, string>> = {};
    for (const side of chosen) pictures[side] = await upload(side, slots.files[side]!);
    const graph = fill(await chooseWorkflow(), pictures, settings());
    const id = await jobs.queue(graph);
    localStorage.setItem(RUNNING, JSON.stringify({ id, graph }));
    await follow(id, graph);
  } catch (error) {
    fail(error instanceof Error ? error.message : String(error));
  } finally {
    busy(false);
  }
}

async function follow(id: string, graph: Graph): Promise<void> {
  running = id;
  busy(true, "Waiting in the queue");
  try {
    const entry = await jobs.follow(id, graph);
    const texts = Object.values(entry.outputs).flatMap(output => output.text ?? []).filter(Boolean);
    $("report").textContent = texts.join("\n");
    $("report").hidden = texts.length === 0;
    const result = resultOf(id, entry, api);
    if (!result) throw new Error("The job ended without a mesh: the workflow has no export that could be shown.");
    await open(result);
  } finally {
    running = null;
    localStorage.removeItem(RUNNING);
    await refreshGallery();
  }
}

function busy(on: boolean, stage = ""): void {
  $<HTMLButtonElement>("make").disabled = on;
  $("stop").hidden = !on || running === null;
  $("progress").hidden = !on;
  if (on) {
    $("stage").textContent = `${stage} …`;
    $("bar").removeAttribute("value");
  } else $("preview").hidden = true;
}

async function open(result: Result, against: Result | null = null): Promise<void> {
  shown = result;
  $("empty").hidden = true;
  viewer.state.object = 0;
  viewer.state.against = null;
  for (const [i, source] of result.sources.entries()) {
    const other = against?.sources.at(-1);
    viewer.state.against = other ? 1 : null;
    await viewer.show(other ? [source, { ...other, name: against?.label ?? "" }] : [source]);
    if (viewer.model || i === result.sources.length - 1) break;
  }
  drawTiles();
}

async function refreshGallery(): Promise<void> {
  const recent = (await jobs.recent()).map(([id, entry]) => resultOf(id, entry, api)).filter(result => result !== null);
  const seen = new Set<string>();
  results = [...recent, ...(await listedResults(api))].filter(({ key }) => !seen.has(key) && seen.add(key)).slice(0, 40);
  drawTiles();
}

function drawTiles(): void {
  $("none").hidden = results.length > 0;
  $("tiles").replaceChildren(...results.map(result => {
    const tile = document.createElement("li");
    const button = document.createElement("button");
    Object.assign(button, { type: "button", className: "open", textContent: "…", onclick: () => void open(result) });
    button.setAttribute("aria-label", `Show ${result.label}`);
    button.setAttribute("aria-current", String(result.key === shown?.key));
    const compare = document.createElement("button");
    Object.assign(compare, { type: "button", className: "against", textContent: "Compare", hidden: !shown || result.key === shown.key });
    compare.setAttribute("aria-label", `Compare the shown result with ${result.label}`);
    compare.onclick = () => { if (shown) void open(shown, result); };
    const label = document.createElement("p");
    label.textContent = result.label;
    tile.append(button, compare, label);
    void thumbnails.of(result).then(url => {
      if (!url) return void (button.textContent = "gone");
      const image = document.createElement("img");
      Object.assign(image, { src: url, alt: "" });
      button.replaceChildren(image);
    });
    return tile;
  }));
}

function applyQuality(): void {
  const quality = QUALITIES[field("quality").value];
  if (!quality) return;
  field("texture_size").value = String(quality.texture_size);
  field("target_faces").value = String(quality.target_faces);
}

function applyTheme(theme: string): void {
  document.documentElement.dataset.theme = theme;
  viewer.set({ background: theme === "dark" ? "dark" : "light" });
}

function buildForm(): void {
  for (const [name, { label }] of Object.entries(QUALITIES)) $("quality").append(new Option(label, name));
  field("quality").value = "standard";
  for (const size of [0, 256, 512, 1024, 2048, 4096]) $("texture_size").append(new Option(size ? `${size}` : "Vertex colours", String(size)));
  applyQuality();
  $("quality").addEventListener("change", applyQuality);
  $("dice").addEventListener("click", () => { field("seed").value = String(Math.floor(Math.random() * 2 ** 32)); });
  $("form").addEventListener("submit", event => { event.preventDefault(); void make(); });
  $("stop").addEventListener("click", () => { if (running) void jobs.stop(running).catch((error: Error) => fail(error.message)); });
  const stored = localStorage.getItem("triptych.theme");
  applyTheme(stored ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light"));
  $("theme").addEventListener("click", () => {
    const theme = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
    localStorage.setItem("triptych.theme", theme);
    applyTheme(theme);
  });
}

/** A job that was running when the page was left is followed again. */
async function resume(): Promise<void> {
  const stored = localStorage.getItem(RUNNING);
  if (!stored) return;
  const { id, graph } = JSON.parse(stored) as { id: string; graph: Graph };
  try {
    await follow(id, graph);
  } catch (error) {
    fail(error instanceof Error ? error.message : String(error));
  } finally {
    busy(false);
  }
}

buildForm();
Object.assign(window, { studio: { viewer, jobs, slots } });
void refreshGallery().then(() => { document.documentElement.dataset.ready = "yes"; });
void resume();
