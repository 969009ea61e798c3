// The grid below the object, with a soft shadow; fades out with distance.
import {
  BufferAttribute, BufferGeometry, Color, CustomBlending, DoubleSide, Mesh, OneFactor, OneMinusSrcAlphaFactor,
  ShaderMaterial, Vector2, type Box3, type Vector3,
} from "three";

const VERTEX = `
uniform float reach; varying vec2 at;
void main() { at = position.xz * reach; gl_Position = projectionMatrix * modelViewMatrix * vec4(at.x, 0.0, at.y, 1.0); }`;

const FRAGMENT = `
varying vec2 at;
uniform float reach, unit, strength, shadow; uniform vec3 ink; uniform vec2 halfSize;
float rule(vec2 p) {
  vec2 width = fwidth(p), away = abs(fract(p - 0.5) - 0.5);
  vec2 on = (1.0 - smoothstep(width * 0.4, width * 1.4, away)) * clamp(0.6 / max(width, 1e-6) - 0.6, 0.0, 1.0);
  return max(on.x, on.y);
}
void main() {
  float fade = pow(max(0.0, 1.0 - length(at) / reach), 1.5);
  float line = max(rule(at / unit) * 0.45, rule(at / (5.0 * unit))) * strength * fade;
  float dark = shadow * exp(-2.2 * dot(at / halfSize, at / halfSize));
  gl_FragColor = vec4(ink * line * (1.0 - dark), line + dark * (1.0 - line));
}`;

export class Ground {
  readonly mesh: Mesh<BufferGeometry, ShaderMaterial>;

  constructor() {
    const square = new BufferGeometry();
    square.setAttribute("position", new BufferAttribute(new Float32Array([-1, 0, -1, 1, 0, -1, -1, 0, 1, 1, 0, 1]), 3));
    square.setIndex([0, 2, 1, 1, 2, 3]);
    const uniforms = {
      reach: { value: 1 }, unit: { value: 1 }, strength: { value: 0 }, shadow: { value: 0 },
      ink: { value: new Color() }, halfSize: { value: new Vector2(1, 1) },
    };
    const material = new ShaderMaterial({
      uniforms, vertexShader: VERTEX, fragmentShader: FRAGMENT, side: DoubleSide, transparent: true, depthWrite: false,
      blending: CustomBlending, blendSrc: OneFactor, blendDst: OneMinusSrcAlphaFactor,
    });
    this.mesh = new Mesh(square, material);
    this.mesh.frustumCulled = false;
    this.mesh.renderOrder = 1;
  }

  place(bounds: Box3, centre: Vector3, radius: number, eyeHeight: number, light: boolean): void {
    const { uniforms } = this.mesh.material;
    const step = 10 ** Math.floor(Math.log10(radius));
    this.mesh.position.set(centre.x, bounds.min.y - radius * 0.002, centre.z);
    uniforms.reach!.value = radius * 5;
    uniforms.unit!.value = radius / step > 4 ? step : step / 5;
    uniforms.strength!.value = light ? 0.22 : 0.26;
    uniforms.shadow!.value = eyeHeight > bounds.min.y ? (light ? 0.28 : 0.5) : 0;
    (uniforms.ink!.value as Color).setScalar(light ? 0 : 1);
    const room = radius * 0.06;
    const [width, depth] = [bounds.max.x - bounds.min.x, bounds.max.z - bounds.min.z];
    (uniforms.halfSize!.value as Vector2).set(width * 0.6 + room, depth * 0.6 + room);
  }
}
