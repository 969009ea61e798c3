// One WebGL context for a whole page. Browsers allow about sixteen: a graph with twenty previews that each hold one
// would lose the oldest. Every view is drawn into the same off-page buffer and copied to a 2D canvas of its own.
import {
  Color, DirectionalLight, HemisphereLight, NeutralToneMapping, Scene, ShaderChunk, SRGBColorSpace, Vector3, WebGLRenderer,
  type PerspectiveCamera,
} from "three";
import type { Box3 } from "three";
import { Ground } from "./ground";
import { LINES, lookOf, type Mode } from "./looks";
import type { Model } from "./model";

export const NO_WEBGL =
  "This browser cannot draw with WebGL 2 here. Switch on hardware acceleration in its settings, or open the mesh file " +
  "in a 3D program.";

export interface Shot {
  width: number;
  height: number;
  /** The model, and for a comparison the one at the right of `split` (a fraction of the width). */
  models: [Model] | [Model, Model];
  split: number;
  camera: PerspectiveCamera;
  frame: { bounds: Box3; centre: Vector3; radius: number };
  mode: Mode;
  /** Degrees around the vertical, relative to the camera. */
  light: number;
  grid: boolean;
  background: "dark" | "light" | "none";
}

// What metal mirrors: a sky over a floor, blurred by roughness. A filtered environment map says the same, but must be made
// at every start, which is slow where WebGL is drawn by the processor.
ShaderChunk.lights_fragment_maps += `
#if defined( RE_IndirectSpecular ) && ! defined( USE_ENVMAP )
  vec3 mirrored = inverseTransformDirection( reflect( - geometryViewDir, geometryNormal ), viewMatrix );
  float blur = 0.08 + 0.9 * material.roughness;
  radiance += mix( vec3( 0.16, 0.15, 0.14 ), vec3( 0.62, 0.64, 0.68 ), smoothstep( - blur, blur, mirrored.y + 0.1 ) );
#endif
`;

const GROUNDS = { dark: new Color(0x17181b), light: new Color(0xeceae6) };

export class Stage {
  private static shared: Stage | null = null;
  private readonly scene = new Scene();
  private readonly ground = new Ground();
  private readonly key = new DirectionalLight(0xfffaf2, 2.2);
  private readonly fill = new DirectionalLight(0xe8f2ff, 0.55);
  private readonly redraws = new Set<() => void>();
  private lost = false;

  private constructor(readonly renderer: WebGLRenderer) {
    renderer.autoClear = false;
    renderer.toneMapping = NeutralToneMapping;
    renderer.outputColorSpace = SRGBColorSpace;
    renderer.setPixelRatio(1);
    this.scene.add(new HemisphereLight(0xf4f7ff, 0x8c857c, 1.6), this.key, this.fill, this.key.target, this.fill.target, this.ground.mesh);
    renderer.domElement.addEventListener("webglcontextlost", () => { this.lost = true; });
    renderer.domElement.addEventListener("webglcontextrestored", () => {
      this.lost = false;
      this.redraws.forEach(redraw => redraw());
    });
  }

  /** The page's stage, made at the first call. Raises Error (NO_WEBGL) where there is no WebGL 2. */
  static get(): Stage {
    if (!Stage.shared) {
      let renderer: WebGLRenderer;
      try {
        renderer = new WebGLRenderer({ antialias: true, alpha: true });
      } catch {
        throw new Error(NO_WEBGL);
      }
      Stage.shared = new Stage(renderer);
    }
    return Stage.shared;
  }

  /** Calls `redraw` when the graphics context was lost and came back; returns what ends that. */
  onRestored(redraw: () => void): () => void {
    this.redraws.add(redraw);
    return () => this.redraws.delete(redraw);
  }

  /** What is on the graphics device now, for tests and bug reports. */
  get memory(): { geometries: number; textures: number } {
    return this.renderer.info.memory;
  }

  /** Draws and copies to `canvas`, whose size becomes the shot's. */
  draw(shot: Shot, canvas: HTMLCanvasElement): void {
    if (this.lost) return;
    const { width, height } = shot;
    this.grow(width, height);
    const { renderer } = this;
    renderer.setScissorTest(true);
    this.light(shot);
    const edge = shot.models.length === 2 ? Math.round(width * shot.split) : width;
    this.half(shot, shot.models[0], 0, edge);
    if (shot.models.length === 2) this.half(shot, shot.models[1], edge, width);
    if (canvas.width !== width || canvas.height !== height) {
      canvas.width = width;
      canvas.height = height;
    }
    const flat = canvas.getContext("2d");
    if (!flat) return;
    flat.globalCompositeOperation = "copy";
    const buffer = renderer.domElement;
    flat.drawImage(buffer, 0, buffer.height - height, width, height, 0, 0, width, height);
  }

  private half(shot: Shot, model: Model, from: number, to: number): void {
    const { renderer, scene, ground } = this;
    if (to <= from) return;
    renderer.setViewport(0, 0, shot.width, shot.height);
    renderer.setScissor(from, 0, to - from, shot.height);
    const { background } = shot;
    renderer.setClearColor(background === "none" ? 0x000000 : GROUNDS[background], background === "none" ? 0 : 1);
    renderer.clear();
    ground.mesh.visible = shot.grid;
    ground.place(shot.frame.bounds, shot.frame.centre, shot.frame.radius, shot.camera.position.y, background !== "dark");
    scene.add(...model.parts);
    const own = model.parts.map(part => part.material);
    for (const part of model.parts) part.material = lookOf(part, shot.mode, part.material) as typeof part.material;
    renderer.render(scene, shot.camera);
    model.parts.forEach((part, i) => { part.material = own[i]!; });
    if (shot.mode === "wireframe") this.lines(shot, model);
    scene.remove(...model.parts);
  }

  private lines(shot: Shot, model: Model): void {
    const own = model.parts.map(part => part.material);
    for (const part of model.parts) part.material = LINES as unknown as typeof part.material;
    this.ground.mesh.visible = false;
    this.renderer.render(this.scene, shot.camera);
    model.parts.forEach((part, i) => { part.material = own[i]!; });
  }

  private light(shot: Shot): void {
    const { camera, frame } = shot;
    const back = camera.position.clone().sub(frame.centre);
    const azimuth = Math.atan2(back.x, back.z) + (shot.light * Math.PI) / 180;
    place(this.key, azimuth, 0.75, frame.centre, frame.radius);
    place(this.fill, azimuth + 2.44, 0.25, frame.centre, frame.radius);
  }

  /** The buffer only grows, so that previews of different sizes do not make it anew for each other. */
  private grow(width: number, height: number): void {
    const { width: w, height: h } = this.renderer.domElement;
    if (width > w || height > h) this.renderer.setSize(Math.max(w, width), Math.max(h, height), false);
  }
}

function place(light: DirectionalLight, azimuth: number, height: number, centre: Vector3, radius: number): void {
  const flat = Math.cos(height);
  const direction = new Vector3(Math.sin(azimuth) * flat, Math.sin(height), Math.cos(azimuth) * flat);
  light.target.position.copy(centre);
  light.target.updateMatrixWorld();
  light.position.copy(centre).addScaledVector(direction, radius * 4);
}
