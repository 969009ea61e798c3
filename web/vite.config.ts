// Three entries: the ComfyUI extension, the viewer module that all share, and the studio page. ComfyUI imports every .js
// below dist as an extension, so triptych.js is the only one.
import { resolve } from "node:path";
import { defineConfig, type Plugin } from "vite";

const at = (path: string): string => resolve(import.meta.dirname, path);

/** Modules that stay outside: the built viewer, of which there is one, and ComfyUI's own, which the page already runs. */
const outside: Plugin = {
  name: "outside",
  enforce: "pre",
  resolveId(source) {
    const id = source.endsWith("viewer/index") ? "./viewer.mjs" : source.endsWith("scripts/app.js") ? "../../scripts/app.js" : null;
    return id === null ? null : { id, external: true };
  },
};

export default defineConfig({
  root: at("."),
  base: "./",
  publicDir: at("public"),
  plugins: [outside],
  build: {
    outDir: at("dist"),
    emptyOutDir: true,
    target: "es2022",
    modulePreload: false,
    chunkSizeWarningLimit: 2000,
    rollupOptions: {
      input: { triptych: at("src/triptych.ts"), viewer: at("src/viewer/index.ts"), studio: at("studio.html") },
      preserveEntrySignatures: "strict",
      output: {
        entryFileNames: ({ name }) => (name === "triptych" ? "triptych.js" : "[name].mjs"),
        chunkFileNames: "[name].mjs",
        assetFileNames: "[name][extname]",
      },
    },
  },
});
