// The studio page: a client of ComfyUI's public API with the workflows that make a mesh from pictures or a sentence.
import { uploadImage, viewUrl, type MeshOutput } from "../comfy/api";
import { Viewer } from "../viewer/index";
import { listedResults, resultOf, Thumbnails, type Result } from "./gallery";
import { Jobs } from "./jobs";
import { Remarks } from "./remarks";
import { Slots } from "./slots";
import { listed, translatePage, words } from "./words";
import { chooseWorkflow, fill, QUALITIES, SIDES, viewsOnly, type Graph, type Kind, type Settings, type Side } from "./workflow";

// The page lies at /extensions/<folder>/studio.html, wherever a proxy puts that.
const api = (path: string): string => new URL(`../..${path.startsWith("/ws") ? "" : "/api"}${path}`, location.href).href;
const $ = <T extends HTMLElement>(id: string): T => document.getElementById(id) as T;
const field = (id: string): HTMLInputElement => $<HTMLInputElement>(id);
const RUNNING = "triptych.job";
const SEEDS = 2 ** 32;
type QualityName = keyof typeof QUALITIES;

let shownPicture = "";
let running: string | null = null;
let results: Result[] = [];
let shown: Result | null = null;
let completeChosen = false;

const viewer = new Viewer($("viewer"), { toInput: async picture => words.savedInput(await uploadImage(api, picture, `triptych_${Date.now()}.png`, "triptych")) });
const thumbnails = new Thumbnails();
const remarks = new Remarks($("warnings"), $("report"));
const slots = new Slots($("slots"), fail, () => plan());
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
  output(node, classType, output) {
    showSheet(output);
    remarks.add(node, classType, output);
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
  const quality = QUALITIES[field("quality").value as QualityName];
  return {
    seed: number("seed"), steps: number("steps"), guidance: number("guidance"), texture_size: number("texture_size"),
    target_faces: Math.round(number("target_faces")), ensemble: quality.ensemble, view_seed: number("view_seed"),
    view_steps: number("view_steps"), view_guidance: number("view_guidance"), view_rerolls: quality.view_rerolls,
  };
}

function sentence(): string {
  return field("sentence").value.trim();
}

/** What the inputs come to; null while there are none. */
function kind(): Kind | null {
  const given = slots.filled.length;
  if (given === 0) return sentence() ? "text" : null;
  return given < SIDES.length && field("complete").checked ? "photo" : "views";
}

/** Says what Make will do with what is there. One picture alone is completed, unless the user decided otherwise. */
function plan(): void {
  const given = slots.filled;
  if (!completeChosen) field("complete").checked = given.length === 1;
  $("complete-row").hidden = given.length === 0 || given.length === SIDES.length;
  const found = kind();
  const missing = SIDES.filter(side => !given.includes(side));
  const unused = found === "views" && sentence() ? ` ${words.planUnused}` : "";
  const sentences = { text: words.planText, photo: words.planPhoto(listed(given), listed(missing)), views: words.planViews(listed(given)) + unused };
  $("plan").textContent = found ? sentences[found] : "";
  if (found === null || found === "views") $("sheet").hidden = true;
}

/** The drawn views, as soon as they are there. */
function showSheet(output: MeshOutput): void {
  const [facts] = output.triptych_views ?? [];
  const [entry] = output.images ?? [];
  if (!facts || !entry) return;
  const image = $("sheet").querySelector("img")!;
  image.src = viewUrl(api, entry);
  image.alt = words.sheetAlt(String(facts.seed));
  $("sheet").hidden = false;
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

/** Queues the workflow for what is there, the views alone or all of it, and follows it to its end. */
async function make(onlyViews = false): Promise<void> {
  fail("");
  remarks.clear();
  const found = kind();
  if (found === null) return fail(words.nothingGiven);
  busy(true, words.sending);
  try {
    const pictures: Partial<Record<Side, string>> = {};
    for (const side of slots.filled) pictures[side] = await upload(side, slots.files[side]!);
    const whole = fill(await chooseWorkflow(found), { kind: found, pictures, sentence: sentence() }, settings());
    const { graph, target } = onlyViews ? viewsOnly(whole) : { graph: whole, target: undefined };
    const id = await jobs.queue(graph, target);
    localStorage.setItem(RUNNING, JSON.stringify({ id, graph, onlyViews }));
    await follow(id, graph, onlyViews);
  } catch (error) {
    fail(error instanceof Error ? error.message : String(error));
  } finally {
    busy(false);
  }
}

async function follow(id: string, graph: Graph, onlyViews: boolean): Promise<void> {
  running = id;
  busy(true, words.queued);
  try {
    const entry = await jobs.follow(id, graph);
    if (onlyViews) return;
    const result = resultOf(id, entry, api);
    if (!result) throw new Error(words.noMesh);
    await open(result);
  } finally {
    running = null;
    localStorage.removeItem(RUNNING);
    if (!onlyViews) await refreshGallery();
  }
}

function busy(on: boolean, stage = ""): void {
  for (const id of ["make", "reroll"]) $<HTMLButtonElement>(id).disabled = on;
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
    button.setAttribute("aria-label", words.show(result.label));
    button.setAttribute("aria-current", String(result.key === shown?.key));
    const compare = document.createElement("button");
    Object.assign(compare, { type: "button", className: "against", textContent: words.compare, hidden: !shown || result.key === shown.key });
    compare.setAttribute("aria-label", words.compareWith(result.label));
    compare.onclick = () => { if (shown) void open(shown, result); };
    const label = document.createElement("p");
    label.textContent = result.label;
    tile.append(button, compare, label);
    void thumbnails.of(result).then(url => {
      if (!url) return void (button.textContent = words.gone);
      const image = document.createElement("img");
      Object.assign(image, { src: url, alt: "" });
      button.replaceChildren(image);
    });
    return tile;
  }));
}

function applyQuality(): void {
  const quality = QUALITIES[field("quality").value as QualityName];
  field("texture_size").value = String(quality.texture_size);
  field("target_faces").value = String(quality.target_faces);
  field("view_steps").value = String(quality.view_steps);
}

function applyTheme(theme: string): void {
  document.documentElement.dataset.theme = theme;
  viewer.set({ background: theme === "dark" ? "dark" : "light" });
}

function buildForm(): void {
  for (const name of Object.keys(QUALITIES) as QualityName[]) $("quality").append(new Option(words.quality[name], name));
  field("quality").value = "standard";
  for (const size of [0, 256, 512, 1024, 2048, 4096]) $("texture_size").append(new Option(size ? `${size}` : words.vertexColours, String(size)));
  applyQuality();
  $("quality").addEventListener("change", applyQuality);
  const another = (id: string): void => { field(id).value = String(Math.floor(Math.random() * SEEDS)); };
  $("dice").addEventListener("click", () => another("seed"));
  $("reroll").addEventListener("click", () => { another("view_seed"); void make(true); });
  $("complete").addEventListener("change", () => { completeChosen = true; plan(); });
  $("sentence").addEventListener("input", plan);
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
  const { id, graph, onlyViews } = JSON.parse(stored) as { id: string; graph: Graph; onlyViews?: boolean };
  try {
    await follow(id, graph, onlyViews ?? false);
  } catch (error) {
    fail(error instanceof Error ? error.message : String(error));
  } finally {
    busy(false);
  }
}

translatePage();
buildForm();
plan();
Object.assign(window, { studio: { viewer, jobs, slots } });
void refreshGallery().then(() => { document.documentElement.dataset.ready = "yes"; });
void resume();
