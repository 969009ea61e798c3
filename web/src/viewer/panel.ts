// The controls over the view. They read the viewer's state and never keep any of their own.
import { capture, type Commands } from "./input";
import { FORMATS } from "./load";
import { MODES, obstacle, type Mode } from "./looks";
import type { Format, Model } from "./model";
import { ICONS, STYLE } from "./style";
import type { Viewer } from "./viewer";
import type { Words } from "./words";

export interface Panel {
  root: HTMLElement;
  canvas: HTMLCanvasElement;
  update(): void;
  message(sentence: string): void;
  note(sentence: string): void;
  loading(on: boolean): void;
  /** The part of the height that the buttons cover. */
  covered(): number;
  remove(): void;
}

type Children = (Node | string)[];

function make<K extends keyof HTMLElementTagNameMap>(
  tag: K, attributes: Record<string, string>, ...children: Children
): HTMLElementTagNameMap[K] {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

function button(label: string, content: string, press: () => void, name: string): HTMLButtonElement {
  const made = make("button", { type: "button", title: label, "aria-label": label, "data-name": name });
  made.innerHTML = content;
  made.addEventListener("click", press);
  return made;
}

function choice(label: string, name: string, change: (value: string) => void): HTMLSelectElement {
  const made = make("select", { "aria-label": label, title: label, "data-name": name });
  made.addEventListener("change", () => change(made.value));
  return made;
}

export function buildPanel(host: HTMLElement, viewer: Viewer, act: Commands, canSend: boolean): Panel {
  const { words } = viewer;
  const shadow = host.shadowRoot ?? host.attachShadow({ mode: "open" });
  const canvas = make("canvas", { tabindex: "0", role: "img" });
  const objects = choice(words.object, "object", value => viewer.set({ object: Number(value) }));
  const against = choice(words.against, "against", value => viewer.set({ against: Number(value) }));
  const facts = make("div", { class: "counts" });
  const modes = choice(words.mode, "mode", value => viewer.set({ mode: value as Mode }));
  for (const mode of MODES) modes.append(make("option", { value: mode }, words[mode]));
  const light = make("input", {
    type: "range", min: "-180", max: "180", step: "1", class: "light", "aria-label": words.light, title: words.light,
    "data-name": "light",
  });
  light.addEventListener("input", () => viewer.set({ light: Number(light.value) }));
  const toggles = toggleButtons(words, act);
  const saves = downloads(viewer);
  const divider = buildDivider(viewer, shadow);
  const message = make("p", { class: "message", role: "alert", hidden: "" });
  const note = make("p", { class: "note", role: "status", hidden: "" });
  const sides = [make("span", { class: "side", style: "left: 8px" }), make("span", { class: "side", style: "right: 8px" })];
  const bars = make("div", { class: "bars" },
    make("div", { class: "bar" }, modes, light),
    viewButtons(words, act),
    make("div", { class: "bar" }, ...Object.values(toggles)),
    make("div", { class: "bar" },
      button(words.picture, ICONS.picture, () => act.picture(), "picture"),
      ...(canSend ? [button(words.toInput, ICONS.toInput, () => void viewer.sendPicture(), "to-input")] : []),
      saves));
  const help = make("p", { class: "help", hidden: "" }, words.helpText);
  const ask = button(words.help, "?", () => { help.hidden = !help.hidden; }, "help");
  ask.classList.add("ask");
  const root = make("div", { class: "root" }, canvas, ...sides, divider, make("div", { class: "facts" }, objects, " ", against, facts),
    bars, ask, help, note, message);
  shadow.replaceChildren(make("style", {}, STYLE), root);

  let noteTimer = 0;
  const panel: Panel = {
    root,
    canvas,
    update() {
      const { state, model, all } = viewer;
      root.dataset.background = state.background;
      if (objects.length !== all.length) {
        for (const list of [objects, against]) list.replaceChildren(...all.map((source, i) => make("option", { value: String(i) }, source.name)));
      }
      objects.hidden = all.length < 2;
      objects.value = String(state.object);
      against.hidden = state.against === null;
      against.value = String(state.against ?? "");
      modes.value = state.mode;
      for (const option of modes.options) {
        const reason = model && obstacle(model, option.value as Mode);
        option.disabled = Boolean(reason);
        option.title = reason ?? "";
      }
      light.value = String(state.light);
      for (const [name, on] of [["turn", state.turn], ["grid", state.grid], ["background", state.background === "light"],
        ["compare", state.against !== null]] as const) toggles[name].setAttribute("aria-pressed", String(on));
      toggles.compare.hidden = all.length < 2;
      const comparing = state.against !== null;
      divider.hidden = !comparing;
      divider.style.left = `${state.split * 100}%`;
      divider.setAttribute("aria-valuenow", String(Math.round(state.split * 100)));
      sides.forEach((side, i) => {
        side.hidden = !comparing;
        side.textContent = all[i ? (state.against ?? 0) : state.object]?.name ?? "";
      });
      bars.hidden = !model;
      facts.replaceChildren(...(model ? [counts(model, words)] : []));
      if (model) canvas.setAttribute("aria-label", `3D: ${model.name}, ${counts(model, words)}. ${words.helpText}`);
    },
    message(sentence) {
      message.textContent = sentence;
      message.hidden = !sentence;
    },
    note(sentence) {
      note.textContent = sentence;
      note.hidden = !sentence;
      clearTimeout(noteTimer);
      noteTimer = window.setTimeout(() => { note.hidden = true; }, 8000);
    },
    loading(on) {
      if (on) panel.message(words.loading);
      else if (message.textContent === words.loading) panel.message("");
    },
    covered: () => Math.min(0.3, bars.offsetHeight / Math.max(1, canvas.clientHeight)),
    remove() {
      clearTimeout(noteTimer);
      shadow.replaceChildren();
    },
  };
  return panel;
}

export function counts(model: Model, words: Words): string {
  const number = (value: number): string => value.toLocaleString("en-US");
  const { min, max } = model.bounds;
  const size = [max.x - min.x, max.y - min.y, max.z - min.z].map(value => String(+value.toPrecision(3))).join(" × ");
  return `${number(model.triangles)} ${words.triangles}, ${number(model.vertices)} ${words.vertices}, ${words.size} ${size}`;
}

function toggleButtons(words: Words, act: Commands): Record<"turn" | "grid" | "background" | "compare", HTMLButtonElement> {
  const one = (name: "turn" | "grid" | "background" | "compare"): HTMLButtonElement =>
    button(words[name], ICONS[name], () => act.toggle(name), name);
  return { turn: one("turn"), grid: one("grid"), background: one("background"), compare: one("compare") };
}

function viewButtons(words: Words, act: Commands): HTMLElement {
  const sides = ["front", "left", "back", "right"] as const;
  const buttons = sides.map((side, i) => {
    const made = button(words[side], "", () => act.look(90 * i), side);
    made.textContent = words[side].slice(0, 1);
    return made;
  });
  return make("div", { class: "bar", role: "group", "aria-label": words.views }, ...buttons,
    button(words.fit, ICONS.fit, () => act.fit(), "fit"));
}

function downloads(viewer: Viewer): HTMLSelectElement {
  const menu = choice(viewer.words.download, "download", value => {
    menu.value = "";
    void viewer.save(value as Format);
  });
  menu.append(make("option", { value: "", disabled: "", selected: "", hidden: "" }, "\u2193"));
  for (const format of ["obj", ...FORMATS.filter(name => name !== "obj")]) {
    menu.append(make("option", { value: format }, format === "obj" ? "OBJ (zip)" : format.toUpperCase()));
  }
  return menu;
}

/** The line between two objects: drag it, or give it the focus and use the arrow keys. */
function buildDivider(viewer: Viewer, shadow: ShadowRoot): HTMLElement {
  const divider = make("div", {
    class: "divider", role: "slider", tabindex: "0", "aria-label": viewer.words.divider, "aria-valuemin": "0", "aria-valuemax": "100",
  });
  const move = (split: number): void => viewer.set({ split: Math.min(1, Math.max(0, split)) });
  divider.addEventListener("pointerdown", event => {
    event.stopPropagation();
    capture(divider, event.pointerId);
    divider.dataset.dragging = "yes";
  });
  divider.addEventListener("pointermove", event => {
    if (!divider.dataset.dragging) return;
    const box = (shadow.host as HTMLElement).getBoundingClientRect();
    move((event.clientX - box.left) / Math.max(1, box.width));
  });
  for (const end of ["pointerup", "pointercancel"]) divider.addEventListener(end, () => { delete divider.dataset.dragging; });
  divider.addEventListener("keydown", event => {
    const step = { ArrowLeft: -0.02, ArrowRight: 0.02, Home: -1, End: 1 }[event.key];
    if (step === undefined) return;
    event.preventDefault();
    event.stopPropagation();
    move(viewer.state.split + step);
  });
  return divider;
}
