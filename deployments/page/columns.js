// Columns side by side, one for each alpha, each showing one of its samples.

import { element, minus, visible } from "./dom.js";
import { counted, find } from "./hits.js";
import { Sample, parting } from "./sample.js";
import { token } from "./tokens.js";

const NAMED = new Map([[-1, "before"], [0, "after"]]);

export class Columns {
  /** `alphas` in the order of the columns; alpha 0 is the one that the others part from. */
  constructor(place, alphas, request, look) {
    Object.assign(this, { request, look, at: 0 });
    this.columns = new Map(alphas.map((alpha) => [alpha, this.column(alpha)]));
    this.done = 0;
    place.replaceChildren(...[...this.columns.values()].map((column) => column.box));
    this.chooser(place.closest("section").querySelector(".samples"));
  }

  /** The buttons that lead through the samples. */
  chooser(place) {
    this.chosen = element("output");
    const buttons = [["‹", "Previous sample", -1], ["›", "Next sample", 1]].map(([sign, name, by]) => {
      const made = element("button", "", sign);
      made.type = "button";
      made.setAttribute("aria-label", name);
      made.addEventListener("click", () => this.show(this.at + by));
      return made;
    });
    place.replaceChildren(buttons[0], this.chosen, buttons[1]);
    place.hidden = this.request.n === 1;
    this.say();
  }

  say() {
    this.chosen.value = `sample ${this.at + 1} of ${this.request.n}, seed ${this.request.seed + this.at}`;
  }

  column(alpha) {
    const box = element("article", "column"), name = NAMED.get(alpha) ?? "amplified";
    box.dataset.alpha = alpha;
    const head = element("h3", "", name);
    head.append(element("span", "aside", ` alpha ${minus(alpha)}`));
    const tokens = element("div", "tokens");
    tokens.setAttribute("role", "group");
    tokens.setAttribute("aria-label", `${name}, alpha ${alpha}: arrow keys go from token to token`);
    const below = element("p", "below"), count = element("p", "count");
    box.append(head, tokens, below, count);
    const samples = Array.from({ length: this.request.n }, (_, i) => new Sample(alpha, i));
    return { alpha, box, tokens, below, count, samples, parts: null };
  }

  /** Takes a piece of the stream; true if it put a token of its alpha on the screen. */
  add(piece) {
    const column = this.columns.get(piece.alpha), sample = column.samples[piece.index];
    const added = sample.add(piece);
    if (piece.completion) {
      this.done += 1;
      this.count(column);
    }
    if (piece.index !== this.at) return false;
    if (added === null) this.fill(column);
    else this.append(column, added);
    this.markAll();
    return Boolean(added?.length) || piece.text !== "";
  }

  append(column, words) {
    column.tokens.append(...words.map((word) => token(word, this.look.colour)));
    const first = column.tokens.querySelector(".token");
    if (first) first.tabIndex = 0;
  }

  /** Draws a column's shown sample anew; a reader's place in it stays. */
  fill(column) {
    const sample = column.samples[this.at], focused = column.tokens.contains(document.activeElement)
      ? document.activeElement.dataset.last : null;
    column.tokens.replaceChildren();
    column.parts = null;
    if (this.request.prefill) {
      column.tokens.append(element("span", "prefill", visible(this.request.prefill)));
    }
    this.append(column, sample.words);
    this.underline(column, sample);
    const done = sample.completion;
    column.below.className = done?.error ? "below failed" : "below";
    column.below.textContent = !done ? "" : done.error ? `failed: ${visible(done.error)}`
      : `${done.token_ids.length} tokens, ended by ${done.finish_reason}`;
    if (focused !== null) column.tokens.querySelector(`[data-last="${focused}"]`)?.focus();
  }

  underline(column, sample) {
    const found = sample.counts ? find(this.look.phrase, sample.answer) : null;
    if (!found) return;
    let end = 0;
    const spans = column.tokens.querySelectorAll(".token");
    sample.words.forEach((word, i) => {
      const start = end;
      end += word.text.length;
      if (start < found[1] && end > found[0]) spans[i].classList.add("match");
    });
  }

  /** Marks in every column the first token that is not the one of alpha 0. */
  markAll() {
    const after = this.columns.get(0);
    if (!after) return;
    const { ids: base, completion: ended } = after.samples[this.at];
    let first = null;
    for (const column of this.columns.values()) {
      if (column === after) continue;
      const { ids, completion } = column.samples[this.at], place = parting(ids, base);
      if (place === null) {
        if (completion && ended && ids.length === base.length) this.note(column, "the same as after");
        continue;
      }
      first = Math.min(first ?? place, place);
      this.mark(column, place, `parts from after at token ${place + 1}`);
    }
    if (first !== null) this.mark(after, first, `the first that parts does so at token ${first + 1}`);
  }

  mark(column, place, text) {
    if (column.parts === place) return;
    const spans = [...column.tokens.querySelectorAll(".token")];
    const found = spans.find((span) => Number(span.dataset.last) >= place);
    if (!found) return; // its text is held back yet
    spans.filter((span) => span.classList.contains("parts")).forEach((span) => {
      span.classList.remove("parts");
      span.title = span.dataset.title;
    });
    found.classList.add("parts");
    found.dataset.title = found.title;
    found.title = `${found.title} · ${text}`;
    column.parts = place;
    column.box.dataset.parts = place;
    this.note(column, text);
  }

  note(column, text) {
    const said = column.box.querySelector(".parting") ?? element("p", "below parting");
    said.textContent = text;
    column.below.before(said);
  }

  count(column) {
    column.count.textContent = counted(this.look.phrase, column.samples);
  }

  /** Everything anew: another sample, colour or phrase. */
  redraw() {
    for (const column of this.columns.values()) {
      column.box.querySelector(".parting")?.remove();
      this.fill(column);
      this.count(column);
    }
    this.markAll();
  }

  show(index) {
    this.at = (index + this.request.n) % this.request.n;
    this.say();
    this.redraw();
  }

  /** Says of what has not ended that it will not. */
  stopped() {
    for (const column of this.columns.values()) {
      if (!column.samples[this.at].completion) column.below.textContent = "stopped";
    }
  }

  get finished() {
    return [this.done, this.columns.size * this.request.n];
  }
}
