// The form: what is asked, as the body of a request and as the fragment of a link.

import { element, get } from "./dom.js";

const form = get("form");
const NAMES = ["format", "system", "prompt", "prefill", "alpha", "temperature", "tokens", "n", "seed",
  "colour", "phrase", "which"];
const WHOLE = ["tokens", "n", "seed"];

// Where the field of a request stands in the form.
const FIELD_OF = {
  prompt: "prompt", prompt_format: "format", system_prompt: "system", prefill: "prefill",
  alpha: "alpha", temperature: "temperature", max_new_tokens: "tokens", n: "n", seed: "seed",
  pair: "which",
};

/** Something a field cannot be; `field` is its name in the form, or null. */
export class BadField extends Error {
  constructor(field, message) {
    super(message);
    this.field = field;
  }
}

function control(name) {
  return name === "format" ? form.elements.format : get(name);
}

function number(name) {
  const { value, validity } = control(name);
  const found = Number(value);
  if (validity.badInput || value.trim() === "" || !Number.isFinite(found)) {
    throw new BadField(name, "must be a number");
  }
  if (WHOLE.includes(name) && !Number.isSafeInteger(found)) {
    throw new BadField(name, "must be a whole number below 2^53");
  }
  return found;
}

/** The alpha of the third column; raises BadField. */
export const alpha = () => number("alpha");

/** The request without its alphas, as `GenerateRequest` has it; raises BadField. */
export function request() {
  const format = control("format").value;
  const made = { prompt: control("prompt").value, prompt_format: format };
  if (format !== "raw") {
    if (control("system").value) made.system_prompt = control("system").value;
    if (control("prefill").value) made.prefill = control("prefill").value;
  }
  if (control("which").value) made.pair = control("which").value;
  return {
    ...made,
    n: number("n"),
    temperature: number("temperature"),
    max_new_tokens: number("tokens"),
    seed: number("seed"),
  };
}

/** All that matters, for a link. */
export function fragment() {
  return new URLSearchParams(NAMES.map((name) => [name, control(name).value])).toString();
}

/** Fills the form from a fragment; true if that held anything. */
export function restore(text) {
  const given = new URLSearchParams(text.replace(/^#/, ""));
  const known = NAMES.filter((name) => given.has(name));
  for (const name of known) {
    const field = control(name), value = given.get(name), before = field.value;
    if (field.type === "number" && !Number.isFinite(Number(value))) continue;
    field.value = value;
    if (value && !field.value) field.value = before; // no such choice
  }
  show();
  return known.length > 0;
}

/** Shows a choice between pairs, by their names; the one that the address names is chosen. */
export function offer(pairs) {
  const wanted = new URLSearchParams(location.hash.slice(1)).get("which");
  control("which").replaceChildren(...pairs.map((name) => element("option", "", name)));
  if (pairs.includes(wanted)) control("which").value = wanted;
  get("pairs").hidden = false;
}

/** What depends on other fields: the slider, and what only some forms have. */
export function show() {
  get("slider").value = control("alpha").value;
  const raw = control("format").value === "raw";
  form.querySelectorAll(".formed").forEach((field) => { field.hidden = raw; });
}

export function clearErrors() {
  document.querySelectorAll(".error[id]").forEach((place) => { place.textContent = ""; });
  form.querySelectorAll("[aria-invalid]").forEach((field) => field.removeAttribute("aria-invalid"));
}

/** Shows a message at the field it is about, or below the form. */
export function showError(message, field) {
  const place = get(field ? `error-${field}` : "error");
  place.textContent = message;
  if (!field) return;
  const found = field === "format" ? form.elements.format[0] : get(field);
  found.setAttribute("aria-invalid", "true");
  found.setAttribute("aria-describedby", place.id);
  found.focus();
}

/** The form's field for a request's, such as `alphas[2]`; null if it has none. */
export function fieldOf(param, alphas) {
  const at = /^alphas\[(\d+)\]$/.exec(param ?? "");
  if (at) return alphas[at[1]] === Number(get("alpha").value) ? "alpha" : null;
  return FIELD_OF[param] ?? null;
}
