// Tokens on the screen: their colours, the numbers they tell, and the keys that lead to them.

import { element, minus, visible } from "./dom.js";

const IMPOSSIBLE = -1e29, INFINITE = 1e29;
const RATIO_STEPS = [0.25, 1, 2, 4]; // nats, as in the jobs' reports
const KL_STEPS = [0.01, 0.1, 0.5, 2];

const level = (steps, size) => steps.filter((step) => size >= step).length;
const log = (x) => (x <= IMPOSSIBLE ? "−∞" : minus(x.toFixed(2)));
const signed = (x) => (x < 0 ? "−" : "+") + Math.abs(x).toFixed(2);

/** The class that colours a word; "" where there is nothing to tell. */
export function colour(word, by) {
  if (by === "kl") {
    const step = level(KL_STEPS, word.kl ?? 0);
    return step ? `k${step}` : "";
  }
  if (word.after === undefined) return "";
  if (word.after <= IMPOSSIBLE && word.before <= IMPOSSIBLE) return "";
  const ratio = word.after - word.before, step = level(RATIO_STEPS, Math.abs(ratio));
  return step ? (ratio > 0 ? "p" : "n") + step : "";
}

/** What the colours mean, as [class, text]. */
export function legend(by) {
  if (by === "kl") {
    return [["", "KL below 0.01 nats"], ...KL_STEPS.map((step, i) => [`k${i + 1}`, `${step} or more`])];
  }
  return [
    ...RATIO_STEPS.map((step, i) => [`n${i + 1}`, `−${step}`]).reverse(), ["", "log-ratio 0 nats"],
    ...RATIO_STEPS.map((step, i) => [`p${i + 1}`, `+${step}`]),
  ];
}

export function describe(word) {
  const quoted = visible(word.text).replaceAll("\n", "⏎").replaceAll("\t", "⇥");
  const place = word.first === word.last ? `token ${word.last + 1}`
    : `tokens ${word.first + 1} to ${word.last + 1}`;
  const parts = [`${place} ${word.eos ? "(end of the answer)" : `“${quoted}”`}`];
  if (word.after !== undefined) {
    parts.push(`log-probability after ${log(word.after)}, before ${log(word.before)}, ` +
      `amplified ${log(word.amplified)}`);
    if (Math.min(word.after, word.before) > IMPOSSIBLE) {
      parts.push(`log-ratio ${signed(word.after - word.before)}`);
    }
  }
  if (word.kl !== undefined) {
    parts.push(`KL ${word.kl >= INFINITE ? "infinite" : `${word.kl.toFixed(3)} nats`}`);
  }
  return parts.join(" · ");
}

export function token(word, by) {
  const made = element("span", "token", word.eos ? "EOS" : visible(word.text));
  const tint = colour(word, by);
  if (tint) made.classList.add(tint);
  if (word.eos) made.classList.add("eos");
  made.dataset.last = word.last;
  made.title = describe(word);
  made.tabIndex = -1;
  return made;
}

/** Arrows within a text, up and down between the columns; says the numbers of the token. */
export function listen(columns, said) {
  columns.addEventListener("keydown", (event) => {
    const here = event.target.closest(".token");
    if (!here || event.altKey || event.ctrlKey || event.metaKey) return;
    const line = [...here.parentNode.querySelectorAll(".token")], place = line.indexOf(here);
    const to = { ArrowRight: place + 1, ArrowLeft: place - 1, Home: 0, End: line.length - 1 }[event.key];
    const beside = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    let next = line[to];
    if (beside) {
      const boxes = [...columns.querySelectorAll(".tokens")];
      const other = boxes[boxes.indexOf(here.parentNode) + beside]?.querySelectorAll(".token");
      next = other?.[Math.min(place, other.length - 1)];
    }
    if (to === undefined && !beside) return;
    event.preventDefault();
    next?.focus();
  });
  const say = (event) => {
    const here = event.target.closest(".token");
    if (here) said.textContent = here.title;
  };
  columns.addEventListener("focusin", say);
  columns.addEventListener("mouseover", say);
}
