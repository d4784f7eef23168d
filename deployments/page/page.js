// The page: what its buttons do. One request at a time.

import { Columns } from "./columns.js";
import { KINDS } from "./copying.js";
import { element, get, visible } from "./dom.js";
import * as form from "./form.js";
import { showRuns } from "./runs.js";
import { ServerError, stream } from "./stream.js";
import { legend, listen } from "./tokens.js";

const SIX = [-1, 0, 0.5, 1, 2, 4];
const look = { get colour() { return get("colour").value; }, get phrase() { return get("phrase").value; } };
const shown = { compare: null, strip: null };
let running = null; // the AbortController of the request under way
let kind = "curl";
let info = null; // what /ready says

const status = (text) => { get("progress").textContent = ""; get("status").textContent = text; };
// Not said aloud: it changes with every token.
const progress = (text) => { get("status").textContent = ""; get("progress").textContent = text; };
const compared = () => [...new Set([-1, 0, form.alpha()])];

/** Asks for the form's prompt at these alphas, and shows the answers as they come. */
async function generate(name, alphasOf) {
  const clicked = performance.now();
  running?.abort();
  form.clearErrors();
  let alphas, request;
  try {
    [alphas, request] = [alphasOf(), form.request()];
  } catch (error) {
    if (!(error instanceof form.BadField)) throw error;
    form.showError(error.message, error.field);
    return;
  }
  keepLink();
  const own = running = new AbortController();
  get("stop").disabled = false;
  status("Asking…");
  let columns = null, first = null;
  try {
    const body = { ...request, alphas, logprobs: true, kl: true };
    for await (const piece of stream("stream", body, own.signal)) {
      if (own.signal.aborted) break;
      // Not before: what is refused leaves the last answer there.
      columns ??= shown[name] = new Columns(get(name), alphas, request, look);
      const drawn = columns.add(piece);
      if (drawn && first === null && piece.alpha === alphas.at(-1)) first = performance.now() - clicked;
      progress(summary(columns, first));
    }
    status(`${summary(columns, first)}, all in ${((performance.now() - clicked) / 1000).toFixed(1)} s`);
  } catch (error) {
    columns?.stopped();
    if (own.signal.aborted) {
      if (running === own) status("Stopped.");
    } else {
      status("");
      const of = error instanceof ServerError ? form.fieldOf(error.param, alphas) : null;
      const said = of ? error.message.replace(`${error.param}: `, "") : error.message;
      form.showError(visible(said), of);
    }
  } finally {
    if (running === own) {
      running = null;
      get("stop").disabled = true;
    }
  }
}

function summary(columns, first) {
  const [done, all] = columns?.finished ?? [0, 0];
  const soon = first === null ? "" : `, first amplified token after ${first.toFixed(0)} ms`;
  return `${done} of ${all} done${soon}`;
}

function redraw() {
  get("legend").replaceChildren(...legend(look.colour).map(([tint, text]) => element("span", tint, text)));
  Object.values(shown).forEach((columns) => columns?.redraw());
}

/** The address says what the form says, so that it can be sent to somebody. */
function keepLink() {
  history.replaceState(null, "", `#${form.fragment()}`);
}

function write() {
  let text;
  try {
    text = kind === "link" ? `${location.href.split("#")[0]}#${form.fragment()}`
      : KINDS[kind]({ ...form.request(), alphas: compared() });
  } catch (error) {
    if (!(error instanceof form.BadField)) throw error;
    text = `# ${error.field} ${error.message}`;
  }
  get("snippet").value = text;
  get("copied").textContent = "";
  get("kinds").querySelectorAll("button").forEach((button) => {
    button.setAttribute("aria-pressed", String(button.value === kind));
  });
}

async function copy() {
  const field = get("snippet");
  field.select(); // so that the keys work where the clipboard is closed: it needs https or localhost
  try {
    await navigator.clipboard.writeText(field.value);
    get("copied").textContent = "Copied.";
  } catch {
    get("copied").textContent = "Selected: copy it with Ctrl+C.";
  }
}

function follow() {
  if (form.restore(location.hash)) status("As the link says. Nothing has run yet: press Generate.");
  sayPair();
  redraw();
  write();
}

async function showPair() {
  const answer = await fetch("ready");
  if (!answer.ok) return;
  info = await answer.json();
  if (info.pairs) form.offer(Object.keys(info.pairs));
  sayPair();
  write();
}

function sayPair() {
  const one = info?.pairs ? info.pairs[get("which").value] : info;
  if (!one) return;
  const { after, before, adapter } = one;
  get("pair").textContent = visible(`after: ${after}${adapter ? ` with ${adapter}` : ""} · before: ${before}`);
}

function setAlpha(value) {
  get("alpha").value = value;
  form.show();
  changed();
}

function changed() {
  form.show();
  sayPair();
  keepLink();
  write();
}

get("form").addEventListener("submit", (event) => {
  event.preventDefault();
  generate("compare", compared);
});
get("form").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) get("form").requestSubmit();
});
get("form").addEventListener("change", changed);
get("slider").addEventListener("input", () => { get("alpha").value = get("slider").value; });
get("alpha").addEventListener("input", form.show);
get("presets").addEventListener("click", (event) => {
  if (event.target.value) setAlpha(event.target.value);
});
get("reseed").addEventListener("click", () => {
  get("seed").value = crypto.getRandomValues(new Uint32Array(1))[0];
  changed();
});
get("stop").addEventListener("click", () => running?.abort());
get("sweep").addEventListener("click", () => generate("strip", () => SIX));
get("colour").addEventListener("change", () => { redraw(); changed(); });
get("phrase").addEventListener("input", redraw);
get("phrase").addEventListener("change", changed);
get("kinds").addEventListener("click", (event) => {
  if (event.target.value) { kind = event.target.value; write(); }
});
get("copy").addEventListener("click", copy);
addEventListener("hashchange", follow);
listen(get("compare"), get("said"));
listen(get("strip"), get("said"));
follow();
showPair();
showRuns();
