// The finished runs that the server shows, with links to their reports.

import { element, get, visible } from "./dom.js";

const WORDS = [[/^report/, "report"], [/^index/, "overview"], [/^summary/, "numbers"], [/^manifest/, "manifest"]];

const kind = (file) => WORDS.findIndex(([pattern]) => pattern.test(file));

function link(run, file) {
  const path = run.name === "." ? [file] : [...run.name.split("/"), file];
  const made = element("a", "", WORDS[kind(file)]?.[1] ?? visible(file));
  made.href = `runs/${path.map(encodeURIComponent).join("/")}`;
  made.title = visible(file);
  return made;
}

function line(run) {
  const made = element("li"), time = element("time", "aside", run.modified.slice(0, 16).replace("T", " "));
  time.dateTime = run.modified;
  made.append(element("span", "name", run.name === "." ? "this folder" : visible(run.name)), time,
    ...run.files.toSorted((a, b) => kind(a) - kind(b)).map((file) => link(run, file)));
  return made;
}

export async function showRuns() {
  const answer = await fetch("runs");
  if (!answer.ok) return;
  const { configured, runs } = await answer.json();
  if (!configured) return;
  get("runs").hidden = false;
  get("list").replaceChildren(...(runs.length ? runs.map(line) : [element("li", "aside", "None yet.")]));
}
