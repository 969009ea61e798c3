// The viewer's texts in English and Simplified Chinese.
const ENGLISH = {
  shaded: "Shaded", clay: "Clay", normals: "Normals", wireframe: "Wireframe", uv: "UV checker", plain: "Texture off",
  texture: "Texture only", colors: "Vertex colours", mode: "Drawing mode", object: "Object shown", views: "Views (left and right are the subject's)",
  front: "Front", left: "Left", back: "Back", right: "Right", fit: "Fit (F)", light: "Light direction ([ and ])",
  turn: "Turntable (T)", grid: "Grid (G)", background: "Light or dark background (B)", compare: "Compare (C)",
  against: "Compared with", divider: "Divider between the two objects", picture: "Save a picture (S)",
  toInput: "Picture to the graph's input", download: "Download", triangles: "triangles", vertices: "vertices",
  size: "size", loading: "Loading…", help: "Controls",
  helpText: "Drag or arrow keys turn, right drag or Shift moves, wheel, pinch or + and - zoom, double click or F fits, " +
    "1 2 3 4 show front, left, back, right, M next mode, T turntable, G grid, B background, C compare, [ and ] light, S picture.",
  lost: "The graphics device was reset; the view comes back by itself.",
};

export type Words = typeof ENGLISH;

const CHINESE: Words = {
  shaded: "着色", clay: "素模", normals: "法线", wireframe: "线框", uv: "UV 棋盘格", plain: "关闭贴图",
  texture: "仅贴图", colors: "顶点颜色", mode: "显示模式", object: "显示的对象", views: "视图（左右以物体自身为准）",
  front: "前", left: "左", back: "后", right: "右", fit: "适应窗口 (F)", light: "光照方向（[ 和 ]）",
  turn: "转台 (T)", grid: "网格 (G)", background: "浅色或深色背景 (B)", compare: "对比 (C)",
  against: "对比对象", divider: "两个对象之间的分隔线", picture: "保存图片 (S)",
  toInput: "把图片送到工作流输入", download: "下载", triangles: "三角形", vertices: "顶点",
  size: "尺寸", loading: "加载中…", help: "操作说明",
  helpText: "拖动或方向键旋转，右键拖动或 Shift 平移，滚轮、双指或 + - 缩放，双击或 F 适应窗口，1 2 3 4 为前左后右，" +
    "M 下一模式，T 转台，G 网格，B 背景，C 对比，[ 和 ] 光照，S 图片。",
  lost: "图形设备已重置，视图会自动恢复。",
};

export function wordsFor(language: string | undefined): Words {
  return language?.toLowerCase().startsWith("zh") ? CHINESE : ENGLISH;
}
