// Files of the four formats -> models.
import { BufferGeometry, LoadingManager, Mesh, MeshStandardMaterial, TextureLoader } from "three";
import { GLTFLoader, type GLTFLoaderPlugin, type GLTFParser } from "three/examples/jsm/loaders/GLTFLoader.js";
import { MTLLoader } from "three/examples/jsm/loaders/MTLLoader.js";
import { OBJLoader } from "three/examples/jsm/loaders/OBJLoader.js";
import { PLYLoader } from "three/examples/jsm/loaders/PLYLoader.js";
import { STLLoader } from "three/examples/jsm/loaders/STLLoader.js";
import { modelOf, modelOfScene, partOf, standard, Model, type Format, type SceneObject } from "./model";

/** A mesh to show: a file with its address, or an object that is already in the page. */
export interface Source {
  name: string;
  /** Address and format of the file that is drawn. */
  url?: string;
  format?: Format;
  /** Address of another file in the same folder (MTL, pictures). */
  beside?: (file: string) => string;
  /** Finished files by format, offered as downloads as they are; the first is the mesh file. */
  files?: Partial<Record<Format, { name: string; url: string }[]>>;
  scene?: SceneObject;
}

export const FORMATS: readonly Format[] = ["glb", "obj", "ply", "stl"];

export function formatOf(filename: string): Format | null {
  const suffix = filename.toLowerCase().split(".").pop();
  return FORMATS.find(format => format === suffix) ?? null;
}

/** Raises Error with one sentence for a file that is gone, is not of its format, or has nothing to show. */
export async function load(source: Source): Promise<Model> {
  if (source.scene) return modelOfScene(source.scene);
  const { url, format, name } = source;
  if (!url || !format) throw new Error(`${name} is in no format that the viewer reads (${FORMATS.join(", ")}).`);
  const bytes = await fetchBytes(url, name);
  try {
    return await parse(bytes, format, source);
  } catch (error) {
    const reason = error instanceof Error ? error.message : String(error);
    throw new Error(`${name} could not be read as ${format.toUpperCase()}: ${reason}`);
  }
}

export async function fetchBytes(url: string, name: string): Promise<ArrayBuffer> {
  const answer = await fetch(url).catch(() => null);
  if (!answer) throw new Error(`${name} could not be fetched: the server does not answer.`);
  if (answer.status === 404) throw new Error(`${name} is no longer on the server: run the graph again.`);
  if (!answer.ok) throw new Error(`${name} could not be fetched: the server answered ${answer.status}.`);
  return answer.arrayBuffer();
}

async function parse(bytes: ArrayBuffer, format: Format, source: Source): Promise<Model> {
  switch (format) {
    case "glb":
      return modelOf((await new GLTFLoader().register(withImageElements).parseAsync(bytes, "")).scene, source.name);
    case "obj":
      return parseObj(new TextDecoder().decode(bytes), source);
    case "ply":
      return single(new PLYLoader().parse(bytes), source.name);
    case "stl":
      return single(withoutNormals(new STLLoader().parse(bytes)), source.name);
  }
}

/**
 * Embedded pictures become image elements. The loader's own way fetches blob: addresses, which ComfyUI's
 * --disable-api-nodes forbids (connect-src 'self'), and draws the mesh white without a word.
 */
function withImageElements(parser: GLTFParser): GLTFLoaderPlugin {
  parser.textureLoader = new TextureLoader(parser.options.manager);
  return { name: "triptych_image_elements" };
}

function single(geometry: BufferGeometry, name: string): Model {
  const material = new MeshStandardMaterial({ roughness: 0.8, metalness: 0 });
  return new Model(name, [partOf(geometry, standard(material, geometry))]);
}

/** A file without normals of its own is shaded round rather than in facets; so is STL, whose normals are its facets'. */
function withoutNormals(geometry: BufferGeometry): BufferGeometry {
  geometry.deleteAttribute("normal");
  return geometry;
}

async function parseObj(text: string, source: Source): Promise<Model> {
  const loader = new OBJLoader();
  const library = /^mtllib[ \t]+(.+?)[ \t]*$/m.exec(text)?.[1];
  const { beside } = source;
  if (library && beside) {
    const manager = new LoadingManager();
    // MTLLoader asks for names relative to nothing; the server wants its own form of address.
    manager.setURLModifier(name => (/^(data|blob):/.test(name) ? name : beside(name.split(/[\\/]/).pop() ?? name)));
    const loaded = new Promise<void>(done => {
      manager.onLoad = done;
      manager.onError = () => done();
    });
    const materials = new MTLLoader(manager).parse(new TextDecoder().decode(await fetchBytes(beside(library), library)), "");
    manager.itemStart("materials");
    materials.preload();
    manager.itemEnd("materials");
    await loaded;
    loader.setMaterials(materials);
  }
  const root = loader.parse(text);
  const hasNormals = /^vn /m.test(text);
  root.traverse(node => {
    const mesh = node as Mesh;
    if (mesh.isMesh && !hasNormals) withoutNormals(mesh.geometry);
  });
  return modelOf(root, source.name);
}
