// The page's texts in English and Simplified Chinese, by the browser's language. Those that stand in studio.html carry
// data-t (text), data-t-label (aria-label and title) or data-t-placeholder; PAGE has their Chinese.
import type { Side } from "./workflow";

const ENGLISH = {
  sides: { front: "front", left: "left", back: "back", right: "right" } as Record<Side, string>,
  slot: { front: "Front", left: "Left", back: "Back", right: "Right" } as Record<Side, string>,
  slotPicture: (side: string) => `${side} picture`,
  slotRemove: (side: string) => `Remove the ${side} picture`,
  notAPicture: (name: string) => `${name} is not a picture.`,
  aFile: "A file",
  fourPlaces: "There are four places: the other pictures were left out.",
  quality: { quick: "Quick", standard: "Standard", fine: "Fine" },
  vertexColours: "Vertex colours",
  nothingGiven: "Put in at least one picture of the object, or write what it is.",
  planText: "All four views are drawn from the sentence, then the mesh is made.",
  planPhoto: (given: string, drawn: string) => `The ${drawn} will be drawn to match the ${given}, then the mesh is made.`,
  planViews: (given: string) => `The mesh is made from the ${given} alone.`,
  planUnused: "The sentence is not used.",
  and: " and ",
  comma: ", ",
  sending: "Sending the pictures",
  queued: "Waiting in the queue",
  noMesh: "The job ended without a mesh: the workflow has no export that could be shown.",
  noWorkflow: "This copy of the page has no workflow for that: build the web part again with install.py.",
  sheetAlt: (seed: string) => `The four views, seed ${seed}: front and left above, back and right below`,
  savedInput: (name: string) => `The picture is in ComfyUI's input folder as ${name}.`,
  gone: "gone",
  show: (name: string) => `Show ${name}`,
  compare: "Compare",
  compareWith: (name: string) => `Compare the shown result with ${name}`,
  connected: "Connected",
  inQueue: (count: number) => `Connected, ${count} in the queue`,
  notConnected: "Not connected: trying again",
  lostJob: "The job is no longer on the server: it was removed from the queue, or the server restarted.",
  noAnswer: "ComfyUI does not answer: check that it still runs, then try again.",
  noReason: "ComfyUI refused the job without a reason.",
  stopped: "Stopped.",
  node: "Node",
  stages: {
    LoadImage: "Loading the pictures", Triptych_LoadBundle: "Loading the model", Triptych_LoadFlux: "Loading the views model",
    Triptych_PrepareViews: "Preparing the views", Triptych_FluxViews: "Drawing the views", PreviewImage: "Showing the views",
    Triptych_Reconstruct: "Making the shape", Triptych_CleanMesh: "Cleaning the mesh", Triptych_TextureMesh: "Painting",
    Triptych_ExportMesh: "Writing the files", Triptych_Preview3D: "Preparing the view", Triptych_RenderViews: "Drawing pictures",
  } as Record<string, string>,
};

type Words = typeof ENGLISH;

const CHINESE: Words = {
  sides: { front: "前", left: "左", back: "后", right: "右" },
  slot: { front: "前", left: "左", back: "后", right: "右" },
  slotPicture: side => `${side}视图的图片`,
  slotRemove: side => `移除${side}视图的图片`,
  notAPicture: name => `${name} 不是图片。`,
  aFile: "有一个文件",
  fourPlaces: "只有四个位置：其余图片未放入。",
  quality: { quick: "快速", standard: "标准", fine: "精细" },
  vertexColours: "顶点颜色",
  nothingGiven: "请至少放入一张物体的图片，或写出它是什么。",
  planText: "先根据这句话绘制四个视图，再生成网格。",
  planPhoto: (given, drawn) => `先绘制与${given}视图相配的${drawn}视图，再生成网格。`,
  planViews: given => `仅根据${given}视图生成网格。`,
  planUnused: "不会用到这句话。",
  and: "、",
  comma: "、",
  sending: "正在发送图片",
  queued: "正在排队",
  noMesh: "任务结束但没有网格：工作流中没有可以显示的导出。",
  noWorkflow: "此页面缺少相应的工作流：请用 install.py 重新构建网页部分。",
  sheetAlt: seed => `四个视图，种子 ${seed}：上方为前、左，下方为后、右`,
  savedInput: name => `图片已存入 ComfyUI 的输入文件夹，名为 ${name}。`,
  gone: "已不存在",
  show: name => `显示 ${name}`,
  compare: "对比",
  compareWith: name => `将显示的结果与 ${name} 对比`,
  connected: "已连接",
  inQueue: count => `已连接，队列中有 ${count} 个任务`,
  notConnected: "未连接：正在重试",
  lostJob: "服务器上已没有此任务：它被移出队列，或服务器已重启。",
  noAnswer: "ComfyUI 没有响应：请确认它仍在运行，然后重试。",
  noReason: "ComfyUI 拒绝了任务，未说明原因。",
  stopped: "已停止。",
  node: "节点",
  stages: {
    LoadImage: "正在加载图片", Triptych_LoadBundle: "正在加载模型", Triptych_LoadFlux: "正在加载视图模型",
    Triptych_PrepareViews: "正在准备视图", Triptych_FluxViews: "正在绘制视图", PreviewImage: "正在显示视图",
    Triptych_Reconstruct: "正在生成形状", Triptych_CleanMesh: "正在清理网格", Triptych_TextureMesh: "正在上色",
    Triptych_ExportMesh: "正在写入文件", Triptych_Preview3D: "正在准备预览", Triptych_RenderViews: "正在绘制图片",
  },
};

const PAGE: Record<string, string> = {
  title: "Triptych 工作室", connecting: "正在连接…", theme: "深色或浅色页面", form: "要生成的内容", pictures: "一个物体的图片",
  slotsHint: "一到四张图片；左右指物体自身的左右。可以一次拖入多张，也可以粘贴。", complete: "绘制缺少的侧面",
  sentence: "它是什么（一句话）", example: "a red wooden chair", quality: "质量", seed: "形状种子", dice: "换一个种子",
  sheet: "视图", viewSeed: "视图种子", reroll: "换一组视图", rerollHint: "只重新绘制视图；满意后点「生成」得到网格。",
  adjust: "调整", viewSteps: "视图步数", viewGuidance: "视图引导", steps: "形状步数", guidance: "形状引导", textureSize: "贴图尺寸",
  triangles: "三角形数", adjustHint: "步数 0 和引导 -1 表示采用模型自己的值。只重新计算受改动影响的部分。", make: "生成", stop: "停止",
  result: "结果", empty: "结果会显示在这里。", making: "生成中的物体", gallery: "以前的结果", none: "还没有。",
};

const chinese = navigator.language.toLowerCase().startsWith("zh");

export const words: Words = chinese ? CHINESE : ENGLISH;

/** Puts the Chinese texts into the page, where the browser speaks Chinese. */
export function translatePage(): void {
  if (!chinese) return;
  document.documentElement.lang = "zh-CN";
  document.title = PAGE.title!;
  const each = (name: string, put: (element: HTMLElement, text: string) => void): void => {
    for (const element of document.querySelectorAll<HTMLElement>(`[${name}]`)) put(element, PAGE[element.getAttribute(name)!] ?? "");
  };
  each("data-t", (element, text) => { element.textContent = text; });
  each("data-t-label", (element, text) => element.setAttribute("aria-label", text));
  each("data-t-placeholder", (element, text) => element.setAttribute("placeholder", text));
  each("data-t-alt", (element, text) => element.setAttribute("alt", text));
}

/** "front", "front and left", "front, left and back". */
export function listed(sides: readonly Side[]): string {
  const names = sides.map(side => words.sides[side]);
  return names.length < 2 ? names.join("") : names.slice(0, -1).join(words.comma) + words.and + names.at(-1)!;
}
