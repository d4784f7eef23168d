// How often a phrase came, and how sure that makes one.

import { visible } from "./dom.js";

const escaped = (text) => text.replace(/[.*+?^${}()|[\]\\/]/g, "\\$&");

/** Where the phrase first is in the text, in whatever case: [start, end), or null. */
export function find(phrase, text) {
  const found = phrase ? new RegExp(escaped(phrase), "iu").exec(text) : null;
  return found && [found.index, found.index + found[0].length];
}

/** P(X <= k) of a binomial X. */
function atMost(k, n, p) {
  let log = n * Math.log1p(-p), sum = Math.exp(log);
  for (let i = 1; i <= k; i += 1) {
    log += Math.log((n - i + 1) / i) + Math.log(p) - Math.log1p(-p);
    sum += Math.exp(log);
  }
  return sum;
}

function solve(rises) {
  let low = 0, high = 1;
  for (let i = 0; i < 60; i += 1) {
    const p = (low + high) / 2;
    if (rises(p)) high = p; else low = p;
  }
  return (low + high) / 2;
}

/** Exact 95 % limits of a rate (Clopper and Pearson 1934), as the jobs' reports have them. */
export function interval(hits, n) {
  const low = hits === 0 ? 0 : solve((p) => 1 - atMost(hits - 1, n, p) > 0.025);
  const high = hits === n ? 1 : solve((p) => atMost(hits, n, p) < 0.025);
  return [low, high];
}

function percent(share) {
  const found = 100 * share;
  return found === 0 || found >= 99.95 ? found.toFixed(0) : found.toPrecision(found < 10 ? 2 : 3);
}

/** "3 of 20 · 15 %, exact 95 % interval 3.2 to 37.9 %" of the finished samples. */
export function counted(phrase, samples) {
  const answers = samples.filter((sample) => sample.counts);
  if (!phrase || !answers.length) return "";
  const hits = answers.filter((sample) => find(phrase, sample.answer)).length, n = answers.length;
  const [low, high] = interval(hits, n);
  return `“${visible(phrase)}” in ${hits} of ${n} · ${percent(hits / n)}\u00a0%, ` +
    `exact 95\u00a0% interval ${percent(low)} to ${percent(high)}\u00a0%`;
}
