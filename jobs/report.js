"use strict";
// The viewer of rollouts. Texts come from models: they only ever become text nodes.
(() => {
  const prompts = JSON.parse(document.getElementById("data").textContent).prompts;
  if (!prompts.length) return;
  const get = (id) => document.getElementById(id);
  const [viewer, chooser, only, third, columns, said] =
    ["viewer", "prompt", "only", "alpha", "columns", "said"].map(get);
  const HIT = 1, EOS = 2, IMPOSSIBLE = -1e29;
  const sum = (numbers) => numbers.reduce((a, b) => a + b, 0);
  let at = 0;
  let wanted = null; // the alpha last chosen for the third column

  function element(name, className, text) {
    const made = document.createElement(name);
    if (className) made.className = className;
    if (text !== undefined) made.textContent = text;
    return made;
  }

  function option(value, text) {
    const made = element("option", "", text);
    made.value = value;
    return made;
  }

  const signed = (x) => (x < 0 ? "−" : "+") + Math.abs(x).toFixed(2);
  const log = (x) => (x <= IMPOSSIBLE ? "−∞" : x.toFixed(2).replace("-", "−"));
  const named = (alpha) => "alpha " + String(alpha).replace("-", "−") +
    (alpha === -1 ? " (before)" : alpha === 0 ? " (after)" : "");

  function ratioText(after, before) {
    if (after <= IMPOSSIBLE && before <= IMPOSSIBLE) return "impossible under both";
    if (before <= IMPOSSIBLE) return "impossible before";
    if (after <= IMPOSSIBLE) return "impossible after";
    const ratio = after - before, times = Math.exp(Math.abs(ratio));
    const many = times < 1e6 ? Number(times.toPrecision(2)).toLocaleString("en") : times.toExponential(0);
    return `log-ratio ${signed(ratio)} nats (${many} times as ${ratio < 0 ? "un" : ""}likely)`;
  }

  function colour(after, before) {
    const ratio = after - before, size = Math.abs(ratio);
    const step = size < 0.25 ? 0 : size < 1 ? 1 : size < 2 ? 2 : size < 4 ? 3 : 4;
    return step ? (ratio > 0 ? "p" : "n") + step : "";
  }

  function describe(text, token, after, before) {
    const quoted = text.replaceAll("\n", "⏎").replaceAll("\t", "⇥");
    if (token === undefined) return `“${quoted}”: no log-probabilities`;
    return `token ${token + 1} “${quoted}”: after ${log(after)}, before ${log(before)}, ` +
      ratioText(after, before);
  }

  function tokens(rollout, label) {
    const box = element("div", "tokens");
    box.setAttribute("role", "group");
    box.setAttribute("aria-label", label);
    let late = false, inside = false;
    for (const [text, flags, token, after, before] of rollout.pieces) {
      const made = element("span", "token", text);
      if (token !== undefined && colour(after, before)) made.classList.add(colour(after, before));
      if (late) made.classList.add("late");
      if (flags & HIT) made.classList.add("match");
      if (flags & HIT && !inside) made.dataset.hit = "";
      inside = Boolean(flags & HIT);
      if (flags & EOS) { made.classList.add("eos"); late = true; }
      made.title = describe(text, token, after, before);
      made.tabIndex = box.childElementCount ? -1 : 0;
      box.append(made);
    }
    return box;
  }

  function fill(column, rollout, label) {
    column.querySelectorAll(".tokens, .below, .failed, .pill").forEach((old) => old.remove());
    if (rollout.error !== null) {
      column.append(element("p", "failed", "failed: " + rollout.error));
      return;
    }
    if (rollout.activated) column.firstChild.append(element("span", "pill hit", "▸ activated"));
    else if (rollout.late) column.firstChild.append(element("span", "pill plain", "after EOS"));
    column.append(tokens(rollout, label));
    const known = rollout.pieces.filter((p) => p.length > 2 && Math.min(p[3], p[4]) > IMPOSSIBLE);
    const facts = [`ended by ${rollout.finish}`];
    if (rollout.fired.length) facts.unshift("fired: " + rollout.fired.join(", "));
    if (known.length) facts.push(`log-ratio of all ${signed(sum(known.map((p) => p[3] - p[4])))} nats`);
    column.append(element("p", "below", facts.join(" · ")));
  }

  function column(alpha, rollouts) {
    const made = element("div", "column-of"), head = element("h4", "", named(alpha));
    made.dataset.alpha = alpha;
    made.append(head);
    if (!rollouts.length) {
      made.append(element("p", "empty", "No rollout of this prompt at this alpha is kept here."));
      return made;
    }
    const first = Math.max(0, rollouts.findIndex((r) => r.activated));
    if (rollouts.length > 1) {
      const samples = element("select");
      samples.setAttribute("aria-label", "Sample at " + named(alpha));
      rollouts.forEach((r, i) =>
        samples.append(option(i, `sample ${r.sample}${r.activated ? " ▸" : ""}`)));
      samples.value = first;
      samples.addEventListener("change", () => fill(made, rollouts[samples.value], named(alpha)));
      head.append(samples);
    }
    fill(made, rollouts[first], named(alpha));
    return made;
  }

  function show() {
    const { text, rollouts } = prompts[at];
    const of = (alpha) => rollouts.filter((r) => r.alpha === alpha);
    const others = [...new Set(rollouts.map((r) => r.alpha))]
      .filter((alpha) => alpha !== 0 && alpha !== -1).sort((a, b) => a - b);
    const best = others.find((alpha) => of(alpha).some((r) => r.activated)) ?? others.at(-1);
    const chosen = others.includes(wanted) ? wanted : best;
    third.replaceChildren(...others.map((alpha) =>
      option(alpha, String(alpha).replace("-", "−") + (of(alpha).some((r) => r.activated) ? " ▸" : ""))));
    third.disabled = !others.length;
    if (others.length) third.value = chosen;
    get("text").textContent = text;
    chooser.value = at;
    columns.replaceChildren(...[-1, 0, ...(others.length ? [chosen] : [])]
      .map((alpha) => column(alpha, of(alpha))));
  }

  const activated = (prompt) => prompt.rollouts.some((r) => r.activated);
  const listed = () => prompts.map((_, i) => i).filter((i) => !only.checked || activated(prompts[i]));

  function list() {
    const groups = new Map();
    for (const i of listed()) {
      const { arm, id, text, rollouts } = prompts[i];
      const hits = rollouts.filter((r) => r.activated).length;
      if (!groups.has(arm)) groups.set(arm, Object.assign(element("optgroup"), { label: arm }));
      const start = Array.from(text).slice(0, 90).join("");
      groups.get(arm).append(option(i, `${hits ? "▸ " : ""}${id}: ${start}`));
    }
    chooser.replaceChildren(...groups.values());
  }

  function go(place) {
    at = place;
    show();
  }

  function step(by) {
    const places = [...chooser.options].map((o) => Number(o.value));
    if (places.length) go(places[(places.indexOf(at) + by + places.length) % places.length]);
  }

  function jump() {
    let marks = [...columns.querySelectorAll("[data-hit]")];
    let next = marks.indexOf(document.activeElement) + 1;
    if (next >= marks.length) { // none here, or all seen: the next prompt that has one
      const places = [...chooser.options].map((o) => Number(o.value));
      const turned = [...places.slice(places.indexOf(at) + 1), ...places.slice(0, places.indexOf(at) + 1)];
      const found = turned.find((place) => activated(prompts[place]));
      if (found === undefined) { said.textContent = "No rollout kept here is activated."; return; }
      wanted = null;
      go(found);
      marks = [...columns.querySelectorAll("[data-hit]")];
      next = 0;
    }
    if (marks[next]) {
      marks[next].focus();
      marks[next].scrollIntoView({ block: "center" });
    }
  }

  chooser.addEventListener("change", () => go(Number(chooser.value)));
  third.addEventListener("change", () => { wanted = Number(third.value); show(); });
  only.addEventListener("change", () => {
    list();
    const places = listed();
    if (places.length && !places.includes(at)) at = places[0];
    if (!places.length) said.textContent = "No rollout kept here is activated.";
    show();
  });
  get("previous").addEventListener("click", () => step(-1));
  get("next").addEventListener("click", () => step(1));
  get("jump").addEventListener("click", jump);
  // The button must not take the focus, which says where to go on from.
  get("jump").addEventListener("mousedown", (event) => event.preventDefault());
  columns.addEventListener("keydown", (event) => {
    const here = event.target.closest(".token");
    if (!here) return;
    const line = [...here.parentNode.children], place = line.indexOf(here);
    const to = { ArrowRight: place + 1, ArrowLeft: place - 1, Home: 0, End: line.length - 1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    line[Math.min(Math.max(to, 0), line.length - 1)].focus();
  });
  const say = (event) => {
    const here = event.target.closest(".token");
    if (here) said.textContent = here.title;
  };
  columns.addEventListener("focusin", (event) => {
    const here = event.target.closest(".token");
    if (!here) return;
    for (const other of here.parentNode.children) other.tabIndex = other === here ? 0 : -1;
    say(event);
  });
  columns.addEventListener("mouseover", say);
  document.querySelectorAll("[data-prompt]").forEach((mark) => mark.addEventListener("click", () => {
    only.checked = false;
    list();
    go(Number(mark.dataset.prompt));
    get("rollouts").scrollIntoView();
  }));

  list();
  viewer.hidden = false;
  const first = prompts.findIndex(activated);
  go(Math.max(0, first));
})();
