// The part of ComfyUI's frontend that the extension uses; the page brings the module itself.
declare module "*/scripts/app.js" {
  export const app: import("./types").ComfyApp;
}
