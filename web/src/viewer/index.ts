// viewer.mjs: the one viewer of the node widget, the studio page and viewer.html.
import { startPage } from "./page";

export { formatOf, fetchBytes, FORMATS, type Source } from "./load";
export type { Format } from "./model";
export { Stage } from "./stage";
export { offer, Viewer, type ViewerOptions, type ViewState } from "./viewer";

startPage();
