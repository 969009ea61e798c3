// What the viewer draws: triangle meshes with one standard material each, and their counts.
// Frame: +Y up, the object faces +Z. Colours in vertices and factors are linear.
import {
  Box3, BufferAttribute, BufferGeometry, Color, DoubleSide, Material, Mesh, MeshStandardMaterial, Object3D, SRGBColorSpace,
  Sphere, Texture, Vector3,
} from "three";

export type Format = "glb" | "obj" | "ply" | "stl";
export type Part = Mesh<BufferGeometry, MeshStandardMaterial>;

/** One object as triptych/viewer/export.py writes it; array fields are base64 of little-endian typed arrays. */
export interface SceneObject {
  name: string;
  vertices: number;
  triangles: number;
  positions: string;
  normals: string;
  uv: string | null;
  colors: string | null;
  indices: string;
  groups: { material: number; start: number; count: number }[];
  materials: { color: number[]; metallic: number; roughness: number; texture: string | null }[];
}

export class Model {
  readonly bounds = new Box3();
  readonly centre = new Vector3();
  readonly radius: number;
  readonly triangles: number;
  readonly vertices: number;

  constructor(readonly name: string, readonly parts: Part[], vertices?: number) {
    let triangles = 0;
    for (const { geometry } of parts) {
      geometry.computeBoundingBox();
      if (geometry.boundingBox) this.bounds.union(geometry.boundingBox);
      triangles += (geometry.index ?? geometry.getAttribute("position")).count / 3;
    }
    const size = this.bounds.getSize(new Vector3());
    if (!triangles) throw new Error("The file has no triangles: there is nothing to show.");
    if (![size.x, size.y, size.z].every(Number.isFinite)) {
      throw new Error("The mesh has vertices that are not finite: clean it before it is shown.");
    }
    this.radius = this.bounds.getBoundingSphere(new Sphere()).radius || 1;
    this.bounds.getCenter(this.centre);
    this.triangles = Math.floor(triangles);
    this.vertices = vertices ?? countVertices(parts);
  }

  has(what: "uv" | "color"): boolean {
    return this.parts.some(part => part.geometry.hasAttribute(what));
  }

  get hasTexture(): boolean {
    return this.parts.some(part => part.material.map && part.geometry.hasAttribute("uv"));
  }

  dispose(): void {
    for (const { geometry, material } of this.parts) {
      geometry.dispose();
      disposeMaterial(material);
    }
  }
}

function disposeMaterial(material: Material): void {
  for (const value of Object.values(material)) {
    if (value instanceof Texture) value.dispose();
  }
  material.dispose();
}

/** A model of everything below `root`, with world transforms baked in and every material a standard one. */
export function modelOf(root: Object3D, name: string): Model {
  root.updateMatrixWorld(true);
  const parts: Part[] = [];
  root.traverse(node => {
    const mesh = node as Mesh;
    if (!mesh.isMesh || !mesh.geometry.hasAttribute("position")) return;
    const geometry = mesh.geometry.clone().applyMatrix4(mesh.matrixWorld);
    const materials = Array.isArray(mesh.material) ? mesh.material : [mesh.material];
    const groups = Array.isArray(mesh.material) ? geometry.groups : [];
    if (groups.length === 0) parts.push(partOf(geometry, standard(materials[0], geometry)));
    for (const { start, count, materialIndex } of groups) {
      const piece = groups.length === 1 ? geometry : slice(geometry, start, count);
      parts.push(partOf(piece, standard(materials[materialIndex ?? 0], piece)));
    }
  });
  return new Model(name, parts);
}

export function partOf(geometry: BufferGeometry, material: MeshStandardMaterial): Part {
  if (!geometry.hasAttribute("normal")) smoothNormals(geometry);
  geometry.clearGroups();
  return new Mesh(geometry, material);
}

function slice(geometry: BufferGeometry, start: number, count: number): BufferGeometry {
  const piece = geometry.clone();
  const { index } = geometry;
  const corners = new Uint32Array(count);
  for (let i = 0; i < count; i++) corners[i] = index ? index.getX(start + i) : start + i;
  piece.setIndex(new BufferAttribute(corners, 1));
  return piece;
}

/** The given material as a standard one that is drawn from both sides; Phong's specular part has no place here. */
export function standard(given: Material | undefined, geometry: BufferGeometry): MeshStandardMaterial {
  const source = given as (Material & Partial<MeshStandardMaterial>) | undefined;
  const material = source?.isMeshStandardMaterial
    ? (source as MeshStandardMaterial)
    : new MeshStandardMaterial({ roughness: 0.8, metalness: 0 });
  if (source && !source.isMeshStandardMaterial) {
    material.name = source.name;
    if (source.color) material.color.copy(source.color);
    material.map = source.map ?? null;
    material.normalMap = source.normalMap ?? null;
    material.bumpMap = source.bumpMap ?? null;
    material.opacity = source.opacity;
    material.transparent = source.transparent;
  }
  // GLTFLoader's answer to a file without normals; here such a file is shaded round, whatever its format.
  material.flatShading = false;
  material.side = DoubleSide;
  material.vertexColors = geometry.hasAttribute("color");
  return material;
}

export async function modelOfScene(source: SceneObject): Promise<Model> {
  const attributes: [string, BufferAttribute | null][] = [
    ["position", new BufferAttribute(decode(source.positions, Float32Array), 3)],
    ["normal", new BufferAttribute(unpackedNormals(decode(source.normals, Int8Array)), 3)],
    ["uv", source.uv ? new BufferAttribute(decode(source.uv, Float32Array), 2) : null],
    ["color", source.colors ? new BufferAttribute(linearColours(decode(source.colors, Uint8Array)), 3) : null],
  ];
  const indices = decode(source.indices, Uint32Array);
  const textures = await Promise.all(source.materials.map(material => pictureTexture(material.texture)));
  const parts = source.groups.map(({ material, start, count }) => {
    const geometry = new BufferGeometry();
    for (const [name, attribute] of attributes) if (attribute) geometry.setAttribute(name, attribute);
    geometry.setIndex(new BufferAttribute(indices.slice(start, start + count), 1));
    const given = source.materials[material]!;
    const look = new MeshStandardMaterial({ roughness: given.roughness, metalness: given.metallic });
    look.color.fromArray(given.color);
    look.map = textures[material] ?? null;
    return partOf(geometry, standard(look, geometry));
  });
  return new Model(source.name, parts, source.vertices);
}

async function pictureTexture(uri: string | null): Promise<Texture | null> {
  if (!uri) return null;
  const image = new Image();
  image.src = uri;
  await image.decode();
  const texture = new Texture(image);
  texture.colorSpace = SRGBColorSpace;
  texture.flipY = false;
  texture.anisotropy = 8;
  texture.needsUpdate = true;
  return texture;
}

function decode<T>(text: string, Type: new (buffer: ArrayBuffer) => T): T {
  const raw = atob(text);
  const bytes = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i++) bytes[i] = raw.charCodeAt(i);
  return new Type(bytes.buffer);
}

function unpackedNormals(packed: Int8Array): Float32Array {
  const normals = new Float32Array((packed.length / 4) * 3);
  for (let i = 0; i < normals.length / 3; i++) {
    for (let k = 0; k < 3; k++) normals[3 * i + k] = packed[4 * i + k]! / 127;
  }
  return normals;
}

function linearColours(packed: Uint8Array): Float32Array {
  const colours = new Float32Array((packed.length / 4) * 3);
  const colour = new Color();
  for (let i = 0; i < colours.length / 3; i++) {
    colour.setRGB(packed[4 * i]! / 255, packed[4 * i + 1]! / 255, packed[4 * i + 2]! / 255, SRGBColorSpace);
    colour.toArray(colours, 3 * i);
  }
  return colours;
}

/** Distinct positions: files repeat a vertex at texture seams, and STL at every corner. */
function countVertices(parts: Part[]): number {
  return distinctPoints(parts.map(part => part.geometry.getAttribute("position"))).count;
}

type Points = ReturnType<BufferGeometry["getAttribute"]>;

/** A number for every point, the same for equal points, over all the lists in order; and how many there are. */
export function distinctPoints(lists: Points[]): { ids: Int32Array; count: number } {
  const total = lists.reduce((sum, list) => sum + list.count, 0);
  const slots = 1 << Math.ceil(Math.log2(Math.max(2, total * 2)));
  const table = new Int32Array(slots).fill(-1);
  const ids = new Int32Array(total);
  const points = new Float32Array(3 * total + 3);
  const bits = new Uint32Array(points.buffer);
  let [filled, at] = [0, 0];
  for (const list of lists) {
    for (let i = 0; i < list.count; i++) {
      // "+ 0" makes one zero of the two.
      points.set([list.getX(i) + 0, list.getY(i) + 0, list.getZ(i) + 0], 3 * filled);
      const [x, y, z] = [bits[3 * filled]!, bits[3 * filled + 1]!, bits[3 * filled + 2]!];
      let slot = (Math.imul(x, 0x9e3779b1) ^ Math.imul(y, 0x85ebca6b) ^ Math.imul(z, 0xc2b2ae35)) >>> 0;
      slot = (slot ^ (slot >>> 15)) & (slots - 1);
      let known = table[slot]!;
      while (known >= 0 && !(bits[3 * known] === x && bits[3 * known + 1] === y && bits[3 * known + 2] === z)) {
        slot = (slot + 1) & (slots - 1);
        known = table[slot]!;
      }
      if (known < 0) known = table[slot] = filled++;
      ids[at++] = known;
    }
  }
  return { ids, count: filled };
}

/** Vertex normals averaged over the faces (by area) that meet at a position, also where a file repeats the vertex. */
export function smoothNormals(geometry: BufferGeometry): void {
  const position = geometry.getAttribute("position");
  const { ids, count } = distinctPoints([position]);
  const sums = new Float32Array(3 * count);
  const { index } = geometry;
  const corners = [new Vector3(), new Vector3(), new Vector3()] as const;
  const [edge, face] = [new Vector3(), new Vector3()];
  for (let k = 0; k + 2 < (index ?? position).count; k += 3) {
    const vertices = [0, 1, 2].map(j => (index ? index.getX(k + j) : k + j));
    corners.forEach((corner, j) => corner.fromBufferAttribute(position, vertices[j]!));
    face.subVectors(corners[1], corners[0]).cross(edge.subVectors(corners[2], corners[0]));
    for (const vertex of vertices) {
      const id = 3 * ids[vertex]!;
      sums[id]! += face.x;
      sums[id + 1]! += face.y;
      sums[id + 2]! += face.z;
    }
  }
  const normals = new Float32Array(3 * position.count);
  for (let i = 0; i < position.count; i++) {
    face.fromArray(sums, 3 * ids[i]!).normalize().toArray(normals, 3 * i);
  }
  geometry.setAttribute("normal", new BufferAttribute(normals, 3));
}
