// The nodes' texts in English and Simplified Chinese.
const ENGLISH = {
  said: "What the last run said",
};

export type Words = typeof ENGLISH;

const CHINESE: Words = {
  said: "上次运行的说明",
};

export function wordsFor(language: string | undefined): Words {
  return language?.toLowerCase().startsWith("zh") ? CHINESE : ENGLISH;
}
