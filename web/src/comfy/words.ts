// The nodes' texts in English and Simplified Chinese.
const ENGLISH = {
  said: "What the last run said",
  uploadMesh: "Upload mesh",
  uploading: "Uploading…",
  noMesh: (names: string, suffixes: string) =>
    `There is no mesh among the files (${names}): choose one of ${suffixes}, an OBJ together with its MTL and pictures.`,
  leftOut: (names: string) => `Left out, because a mesh does not use such files: ${names}.`,
};

export type Words = typeof ENGLISH;

const CHINESE: Words = {
  said: "上次运行的说明",
  uploadMesh: "上传网格",
  uploading: "正在上传…",
  noMesh: (names, suffixes) => `所选文件（${names}）中没有网格：请选择 ${suffixes} 之一，OBJ 请连同其 MTL 和图片一起选择。`,
  leftOut: names => `以下文件不属于网格，未上传：${names}。`,
};

export function wordsFor(language: string | undefined): Words {
  return language?.toLowerCase().startsWith("zh") ? CHINESE : ENGLISH;
}
