// The drawing modes, as materials made from a part's own.
import {
  DoubleSide, Material, MeshBasicMaterial, MeshStandardMaterial, ShaderMaterial, Vector2,
} from "three";
import type { Model, Part } from "./model";

export const MODES = ["shaded", "clay", "normals", "wireframe", "uv", "plain", "texture", "colors"] as const;
export type Mode = (typeof MODES)[number];

/** Why this model cannot be shown in a mode, or null. */
export function obstacle(model: Model, mode: Mode): string | null {
  if (mode === "uv" && !model.has("uv")) return "This object has no UVs";
  if (mode === "texture" && !model.hasTexture) return "This object has no texture";
  if (mode === "colors" && !model.has("color")) return "This object has no vertex colours";
  return null;
}

const NORMALS = new ShaderMaterial({
  side: DoubleSide,
  vertexShader: `varying vec3 n;
    void main() { n = mat3(modelMatrix) * normal; gl_Position = projectionMatrix * modelViewMatrix * vec4(position, 1.0); }`,
  fragmentShader: `varying vec3 n;
    void main() { gl_FragColor = vec4(normalize(n) * (gl_FrontFacing ? 0.5 : -0.5) + 0.5, 1.0); }`,
});

const CHECKER = new ShaderMaterial({
  side: DoubleSide,
  uniforms: { cells: { value: new Vector2(16, 16) } },
  vertexShader: `varying vec2 t;
    void main() { t = uv; gl_Position = projectionMatrix * modelViewMatrix * vec4(position, 1.0); }`,
  fragmentShader: `varying vec2 t; uniform vec2 cells;
    void main() {
      vec2 cell = floor(t * cells);
      float dark = mod(cell.x + cell.y, 2.0);
      vec3 tint = vec3(fract(t), 0.35);
      gl_FragColor = vec4(mix(tint, mix(tint, vec3(1.0), 0.62), dark), 1.0);
    }`,
});

const CLAY = new MeshStandardMaterial({ color: 0xbebcb8, roughness: 0.75, metalness: 0, side: DoubleSide });
const CLAY_BELOW_LINES = CLAY.clone();
Object.assign(CLAY_BELOW_LINES, { polygonOffset: true, polygonOffsetFactor: 1, polygonOffsetUnits: 1 });
export const LINES = new MeshBasicMaterial({ color: 0x14171c, wireframe: true, toneMapped: false });

/** Materials that a part's own is turned into, made once per part and mode. */
const derived = new WeakMap<Part, Map<Mode, Material>>();

export function lookOf(part: Part, mode: Mode, own: MeshStandardMaterial): Material {
  if (mode === "shaded") return own;
  if (mode === "clay") return CLAY;
  if (mode === "wireframe") return CLAY_BELOW_LINES;
  if (mode === "normals") return NORMALS;
  if (mode === "uv") return part.geometry.hasAttribute("uv") ? CHECKER : CLAY;
  const known = derived.get(part) ?? new Map<Mode, Material>();
  derived.set(part, known);
  let look = known.get(mode);
  if (!look) {
    look = derive(part, mode, own);
    known.set(mode, look);
  }
  return look;
}

function derive(part: Part, mode: Mode, own: MeshStandardMaterial): Material {
  if (mode === "plain") {
    const { color, roughness, metalness } = own;
    return new MeshStandardMaterial({ color, roughness, metalness, side: DoubleSide });
  }
  const basic = new MeshBasicMaterial({ side: DoubleSide, toneMapped: false });
  if (mode === "texture") {
    basic.color.copy(own.color);
    basic.map = own.map;
  }
  basic.vertexColors = mode === "colors" && part.geometry.hasAttribute("color");
  return basic;
}

export function forgetLooks(part: Part): void {
  for (const material of derived.get(part)?.values() ?? []) material.dispose();
  derived.delete(part);
}
