// The shown model as a file of one of the four formats, for the "Download" menu.
import { Color, Group, Mesh, SRGBColorSpace, Vector3, type BufferAttribute, type Texture } from "three";
import { GLTFExporter } from "three/examples/jsm/exporters/GLTFExporter.js";
import { PLYExporter } from "three/examples/jsm/exporters/PLYExporter.js";
import { STLExporter } from "three/examples/jsm/exporters/STLExporter.js";
import { strToU8, zipSync } from "three/examples/jsm/libs/fflate.module.js";
import { fetchBytes, type Source } from "./load";
import type { Format, Model, Part } from "./model";

export interface Download {
  name: string;
  blob: Blob;
}

/** Finished files of the format are passed on as they are; otherwise the model is written here. OBJ is always a zip. */
export async function download(model: Model, source: Source, format: Format): Promise<Download> {
  const stem = safeStem(source.name);
  const finished = source.files?.[format];
  if (finished?.length && format !== "obj") {
    const [file] = finished;
    return { name: file!.name, blob: new Blob([await fetchBytes(file!.url, file!.name)]) };
  }
  if (format === "obj") {
    const files: Record<string, Uint8Array> = {};
    for (const { name, url } of finished ?? []) files[name] = new Uint8Array(await fetchBytes(url, name));
    const content = finished?.length ? files : await writeObj(model, stem);
    return { name: `${stem}.zip`, blob: new Blob([zipSync(content) as Uint8Array<ArrayBuffer>], { type: "application/zip" }) };
  }
  return { name: `${stem}.${format}`, blob: new Blob([await write(model, format)], { type: "application/octet-stream" }) };
}

function safeStem(name: string): string {
  return name.replace(/\.\w{2,5}$/, "").replace(/[^\p{L}\p{N}_-]+/gu, "_").replace(/^_+|_+$/g, "") || "model";
}

async function write(model: Model, format: "glb" | "ply" | "stl"): Promise<ArrayBuffer> {
  const root = new Group();
  root.add(...model.parts.map(part => new Mesh(part.geometry, part.material)));
  root.updateMatrixWorld(true);
  if (format === "glb") return (await new GLTFExporter().parseAsync(root, { binary: true })) as ArrayBuffer;
  if (format === "stl") return new STLExporter().parse(root, { binary: true }).buffer as ArrayBuffer;
  const bytes = new PLYExporter().parse(root, () => undefined, { binary: true, littleEndian: true });
  if (!bytes) throw new Error("The model could not be written as PLY.");
  return bytes as ArrayBuffer;
}

/** OBJ, MTL and PNG by file name. Vertex colours follow the position, in sRGB. */
async function writeObj(model: Model, stem: string): Promise<Record<string, Uint8Array>> {
  const files: Record<string, Uint8Array> = {};
  const obj = [`mtllib ${stem}.mtl`];
  const mtl: string[] = [];
  let base = 1;
  let uvBase = 1;
  for (const [i, part] of model.parts.entries()) {
    const label = `material${i + 1}`;
    const { color, map } = part.material;
    mtl.push(`newmtl ${label}`, `Kd ${numbers(color.clone().convertLinearToSRGB().toArray())}`);
    if (map && part.geometry.hasAttribute("uv")) {
      const name = `${stem}${i ? i + 1 : ""}.png`;
      files[name] = await png(map);
      mtl.push(`map_Kd ${name}`);
    }
    writePart(part, label, base, uvBase, obj);
    base += part.geometry.getAttribute("position").count;
    uvBase += part.geometry.getAttribute("uv")?.count ?? 0;
  }
  files[`${stem}.mtl`] = strToU8(mtl.join("\n") + "\n");
  files[`${stem}.obj`] = strToU8(obj.join("\n") + "\n");
  return files;
}

function writePart({ geometry, material }: Part, label: string, base: number, uvBase: number, lines: string[]): void {
  const [position, normal] = [geometry.getAttribute("position"), geometry.getAttribute("normal")];
  const uv = geometry.getAttribute("uv") as BufferAttribute | undefined;
  const colour = geometry.getAttribute("color") as BufferAttribute | undefined;
  const ink = new Color();
  const at = new Vector3();
  lines.push(`usemtl ${label}`);
  for (let i = 0; i < position.count; i++) {
    const place = numbers(at.fromBufferAttribute(position, i).toArray());
    const tint = colour ? " " + numbers(ink.fromBufferAttribute(colour, i).getRGB(ink, SRGBColorSpace)) : "";
    lines.push(`v ${place}${tint}`);
  }
  // A picture whose first row is t = 0 is turned over for OBJ, whose t goes up.
  const down = material.map ? !material.map.flipY : false;
  if (uv) for (let i = 0; i < uv.count; i++) lines.push(`vt ${numbers([uv.getX(i), down ? 1 - uv.getY(i) : uv.getY(i)])}`);
  for (let i = 0; i < normal!.count; i++) lines.push(`vn ${numbers(at.fromBufferAttribute(normal!, i).toArray())}`);
  const corner = (i: number): string => `${base + i}/${uv ? uvBase + i : ""}/${base + i}`;
  const { index } = geometry;
  const count = (index ?? position).count;
  const vertex = (k: number): number => (index ? index.getX(k) : k);
  for (let k = 0; k + 2 < count; k += 3) {
    lines.push(`f ${corner(vertex(k))} ${corner(vertex(k + 1))} ${corner(vertex(k + 2))}`);
  }
}

function numbers(values: Iterable<number> | { r: number; g: number; b: number }): string {
  const list = "r" in values ? [values.r, values.g, values.b] : [...values];
  return list.map(value => String(+value.toPrecision(9))).join(" ");
}

async function png(texture: Texture): Promise<Uint8Array> {
  const image = texture.image as CanvasImageSource & { width: number; height: number };
  const canvas = document.createElement("canvas");
  canvas.width = image.width;
  canvas.height = image.height;
  canvas.getContext("2d")?.drawImage(image, 0, 0);
  const blob = await new Promise<Blob | null>(done => canvas.toBlob(done, "image/png"));
  if (!blob) throw new Error("The texture could not be written as PNG.");
  return new Uint8Array(await blob.arrayBuffer());
}
