// Four places for pictures: drop, choose, paste or remove.
import { words } from "./words";
import { SIDES, type Side } from "./workflow";

const HINTS: Record<Side, RegExp> = {
  front: /front|vorn|avant|正/i, left: /left|links|左/i, back: /back|rear|hinten|背|后/i, right: /right|rechts|右/i,
};

export class Slots {
  readonly files: Partial<Record<Side, File>> = {};
  private readonly elements = new Map<Side, { slot: HTMLElement; image: HTMLImageElement; input: HTMLInputElement }>();

  constructor(parent: HTMLElement, private readonly refuse: (sentence: string) => void, private readonly changed: () => void) {
    for (const side of SIDES) parent.append(this.build(side));
    document.addEventListener("dragover", event => event.preventDefault());
    document.addEventListener("drop", event => {
      event.preventDefault();
      this.take([...(event.dataTransfer?.files ?? [])], null);
    });
    document.addEventListener("paste", event => this.take([...(event.clipboardData?.files ?? [])], null));
  }

  /** Puts pictures in: the first where it was dropped, the rest by their names, then in order. */
  take(files: File[], at: Side | null): void {
    const pictures = files.filter(file => file.type.startsWith("image/"));
    if (files.length > pictures.length) this.refuse(words.notAPicture(files.find(file => !pictures.includes(file))?.name ?? words.aFile));
    if (pictures.length === 1 && at) return this.put(at, pictures[0]!);
    const open = new Set<Side>(SIDES);
    const rest: File[] = [];
    for (const file of pictures) {
      const side = SIDES.find(each => open.has(each) && HINTS[each].test(file.name));
      if (side && pictures.length > 1) {
        open.delete(side);
        this.put(side, file);
      } else rest.push(file);
    }
    for (const file of rest) {
      const side = SIDES.find(each => open.has(each) && !this.files[each]) ?? SIDES.find(each => open.has(each));
      if (!side) return this.refuse(words.fourPlaces);
      open.delete(side);
      this.put(side, file);
    }
  }

  /** The sides that have a picture, in their order. */
  get filled(): Side[] {
    return SIDES.filter(side => this.files[side]);
  }

  private put(side: Side, file: File | null): void {
    const { slot, image, input } = this.elements.get(side)!;
    URL.revokeObjectURL(image.src);
    if (file) {
      this.files[side] = file;
      image.src = URL.createObjectURL(file);
    } else {
      delete this.files[side];
      image.removeAttribute("src");
      input.value = "";
    }
    image.hidden = !file;
    slot.classList.toggle("filled", file !== null);
    this.changed();
  }

  private build(side: Side): HTMLElement {
    const title = words.slot[side];
    const slot = document.createElement("label");
    slot.className = "slot";
    slot.dataset.side = side;
    slot.innerHTML = `<img alt="" hidden><span>${title}</span><input type="file" accept="image/*" multiple aria-label="${words.slotPicture(title)}">` +
      `<button type="button" aria-label="${words.slotRemove(words.sides[side])}">×</button>`;
    const [image, input, remove] = [slot.querySelector("img")!, slot.querySelector("input")!, slot.querySelector("button")!];
    this.elements.set(side, { slot, image, input });
    input.addEventListener("change", () => this.take([...(input.files ?? [])], side));
    remove.addEventListener("click", event => { event.preventDefault(); this.put(side, null); });
    slot.addEventListener("dragover", event => { event.preventDefault(); slot.classList.add("over"); });
    slot.addEventListener("dragleave", () => slot.classList.remove("over"));
    slot.addEventListener("drop", event => {
      event.preventDefault();
      event.stopPropagation();
      slot.classList.remove("over");
      this.take([...(event.dataTransfer?.files ?? [])], side);
    });
    return slot;
  }
}
