export const STYLE = `
:host { display: block; position: relative; min-width: 0; min-height: 0; overflow: hidden; }
.root { --ground: #17181b; --panel: rgba(32, 34, 38, .86); --line: rgba(255, 255, 255, .1); --text: #e7e8ea;
  --quiet: #a3a8b0; --hover: rgba(255, 255, 255, .1); --chosen: #e7e8ea; --on-chosen: #17181b; --focus: #7fb0ff;
  position: absolute; inset: 0; background: var(--ground); color: var(--text); color-scheme: dark;
  font: 12px/1.35 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; user-select: none; -webkit-user-select: none; }
.root[data-background=light] { --ground: #eceae6; --panel: rgba(255, 255, 255, .88); --line: rgba(0, 0, 0, .12);
  --text: #24262a; --quiet: #5f646c; --hover: rgba(0, 0, 0, .07); --chosen: #2b2d32; --on-chosen: #fff; --focus: #1d5fd0;
  color-scheme: light; }
* { box-sizing: border-box; margin: 0; }
[hidden] { display: none !important; }
canvas { position: absolute; inset: 0; width: 100%; height: 100%; display: block; touch-action: none; cursor: grab; outline: none; }
canvas.dragging { cursor: grabbing; }
:focus-visible { outline: 2px solid var(--focus); outline-offset: 1px; }
canvas:focus-visible { outline-offset: -3px; }
.facts { position: absolute; left: 8px; top: 8px; max-width: calc(100% - 48px); color: var(--quiet); pointer-events: none;
  font-variant-numeric: tabular-nums; text-shadow: 0 0 4px var(--ground), 0 0 2px var(--ground); }
.facts > * { pointer-events: auto; }
.facts select { max-width: 100%; margin-bottom: 4px; }
.bars { position: absolute; left: 6px; right: 6px; bottom: 6px; display: flex; flex-wrap: wrap; gap: 4px; justify-content: center;
  pointer-events: none; }
.bar { display: flex; align-items: center; gap: 1px; padding: 2px; background: var(--panel); border: 1px solid var(--line);
  border-radius: 8px; pointer-events: auto; backdrop-filter: blur(10px); }
button, select { font: inherit; color: inherit; border: 0; border-radius: 6px; min-height: 26px; cursor: pointer; }
button { background: none; min-width: 26px; padding: 0 5px; display: inline-flex; align-items: center; justify-content: center; }
select { background: var(--panel); border: 1px solid var(--line); padding: 0 4px; }
.bar select { border: 0; background: transparent; }
.bar select[data-name=download] { width: 40px; font-size: 15px; }
option { font-size: 12px; color: #16181b; background: #fff; }
button:hover:not(:disabled), .bar select:hover { background: var(--hover); }
button[aria-pressed=true] { background: var(--chosen); color: var(--on-chosen); }
button:disabled { opacity: .4; cursor: default; }
svg { width: 16px; height: 16px; fill: none; stroke: currentColor; stroke-width: 1.5; stroke-linecap: round; stroke-linejoin: round; }
input[type=range] { width: 64px; height: 26px; margin: 0 4px; accent-color: var(--quiet); touch-action: none; }
.divider { position: absolute; top: 0; bottom: 0; width: 24px; margin-left: -12px; cursor: ew-resize; touch-action: none; }
.divider::before { content: ""; position: absolute; left: 11px; top: 0; bottom: 0; width: 2px; background: var(--text); opacity: .75; }
.divider::after { content: "\\2194"; position: absolute; left: 0; top: calc(50% - 12px); width: 24px; height: 24px; border-radius: 50%;
  background: var(--chosen); color: var(--on-chosen); display: grid; place-items: center; font-size: 14px; }
.side { position: absolute; top: 64px; padding: 2px 7px; background: var(--panel); border-radius: 6px; max-width: 40%; overflow: hidden;
  text-overflow: ellipsis; white-space: nowrap; }
.message, .note { position: absolute; background: var(--panel); border: 1px solid var(--line); border-radius: 8px; user-select: text; }
.message { inset: 0; margin: auto; width: min(420px, calc(100% - 24px)); height: max-content; max-height: calc(100% - 24px); overflow: auto;
  padding: 12px 14px; font-size: 13px; }
.note { left: 8px; right: 8px; bottom: 76px; margin: 0 auto; width: max-content; max-width: calc(100% - 16px); padding: 5px 10px; }
.help { right: 8px; top: 40px; position: absolute; width: min(300px, calc(100% - 16px)); padding: 8px 10px; background: var(--panel);
  border: 1px solid var(--line); border-radius: 8px; }
.ask { position: absolute; right: 8px; top: 8px; }
/* A node is 320 wide by default, which leaves 296: these widths keep the bars in two rows there. */
@container (max-width: 380px) { .bar select[data-name=mode] { width: 72px; } input[type=range] { width: 48px; } }
.root { container-type: size; }
`;

const path = (...shapes: string[]): string => `<svg viewBox="0 0 16 16" aria-hidden="true">${shapes.map(d => `<path d="${d}"/>`).join("")}</svg>`;

export const ICONS = {
  fit: path("M2 6V2h4M10 2h4v4M14 10v4h-4M6 14H2v-4"),
  turn: path("M2 8c0-2 2.7-3.5 6-3.5S14 6 14 8s-2.7 3.5-6 3.5", "M10 9.5 8 11.5l2 2"),
  grid: path("M2 5.5h12M2 10.5h12M5.5 2v12M10.5 2v12"),
  background: path("M8 2a6 6 0 1 0 0 12z", "M8 2a6 6 0 0 1 0 12"),
  compare: path("M8 1.5v13", "M6 4H2v8h4M10 4h4v8h-4"),
  picture: path("M2 5h3l1-2h4l1 2h3v8H2z", "M8 7a2 2 0 1 0 0 4 2 2 0 0 0 0-4z"),
  toInput: path("M9 2h5v12H9", "M2 8h8M7.5 5.5 10 8l-2.500 2.5"),
  download: path("M8 2v8M5 7.5 8 10.500l3-3M2.500 13.500h11"),
};
