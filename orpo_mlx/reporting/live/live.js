"use strict";

const SVG = "http://www.w3.org/2000/svg";
const MARGIN = {left: 56, right: 20, top: 8, bottom: 22};
const RETRIES = 3, RETRY_MS = 2000, PACES = 20;

const element = (id) => document.getElementById(id);
const {charts, splits} = JSON.parse(element("charts").dataset.what);
const series = charts.flatMap((chart, number) => chart.keys.flatMap((key, place) => splits.map((split) => ({
  chart: number, key, split, colour: chart.keys.length > 1 ? 3 * place : splits.indexOf(split),
  label: chart.keys.length > 1 ? `${split} ${key.split("/").at(-1)}` : split, steps: [], values: [],
}))));
const keys = new Set(series.map((one) => one.key));
const page = Array.from(crypto.getRandomValues(new Uint8Array(8)), (byte) => byte.toString(16).padStart(2, "0")).join("");
const heading = document.title;

let facts = {state: "", total: null, since: 0, elapsed_s: null, age_s: null, said: [], last: false};
let lost = false, unread = 0, notFinite = 0, newest = 0, trained = 0, paces = [], due = false;
let mark = "", answers = [];

/* ---- what a run reported ---- */

function forget() {
  for (const one of series) { one.steps = []; one.values = []; }
  unread = notFinite = newest = trained = 0;
  paces = [];
}

/* One line of metrics.jsonl. Of two reports of one step and split, the later one holds. */
function take(line) {
  let row = null;
  try { row = JSON.parse(line); } catch { /* It is counted below. */ }
  if (row === null || typeof row !== "object" || !Number.isSafeInteger(row.step) || row.step < 0 ||
      !splits.includes(row.split)) {
    unread += 1;
    return;
  }
  newest = Math.max(newest, row.step);
  if (row.split === "train") trained = Math.max(trained, row.step);
  for (const one of series) {
    if (one.split !== row.split || !Object.hasOwn(row, one.key)) continue;
    const value = Number.isFinite(row[one.key]) ? row[one.key] * charts[one.chart].factor : NaN;
    if (Number.isNaN(value)) notFinite += 1;
    put(one, row.step, value);
  }
}

function put(one, step, value) {
  const at = after(one.steps, step);
  if (at > 0 && one.steps[at - 1] === step) one.values[at - 1] = value;
  else if (at === one.steps.length) { one.steps.push(step); one.values.push(value); }
  else { one.steps.splice(at, 0, step); one.values.splice(at, 0, value); }
}

/* How many of the ascending `steps` are `step` or less. */
function after(steps, step) {
  let low = 0, high = steps.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (steps[middle] <= step) low = middle + 1; else high = middle;
  }
  return low;
}

/* ---- the server ---- */

/* Ask once; what the answer begins with. */
async function ask() {
  const reply = await fetch(`/news?page=${page}&after=${mark}`, {cache: "no-store"});
  if (!reply.ok) throw new Error(`status ${reply.status}`);
  const answer = await reply.text(), end = answer.indexOf("\n"), head = JSON.parse(answer.slice(0, end));
  answers.push({head, lines: answer.slice(end + 1).split("\n"), at: performance.now()});
  mark = head.mark;
  return head;
}

/* While the page is paused, answers wait here. */
function takeAnswers() {
  for (const {head, lines, at} of answers) {
    facts = head;
    if (head.again) forget();
    const before = trained;
    for (const line of lines) if (line.trim() !== "") take(line);
    if (trained > before && !head.more) paces = [...paces, {at, step: trained}].slice(-PACES);
  }
  answers = [];
}

async function follow() {
  element("again").hidden = true;
  lost = false;
  let last = false;
  for (let failures = 0; failures < RETRIES && !last;) {
    try {
      const head = await ask();
      failures = 0;
      last = head.last;
      if (!head.more) draw();
    } catch {
      failures += 1;
      await new Promise((resolve) => setTimeout(resolve, RETRY_MS));
    }
  }
  lost = !last;
  element("again").hidden = false;
  draw();
}

/* ---- words ---- */

function duration(seconds) {
  const minutes = Math.round(seconds / 60);
  if (seconds < 90) return `${Math.round(seconds)} s`;
  if (minutes < 90) return `${minutes} min`;
  if (minutes < 48 * 60) return `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
  return `${Math.round(minutes / 1440)} days`;
}

function short(value) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size < 1e-3 || size >= 1e6) return value.toExponential(2);
  return value.toFixed(Math.max(0, 3 - Math.floor(Math.log10(size))));
}

/* Seconds for each step: as seen by this page, or else on average since the run was started or resumed. */
function pace() {
  const first = paces[0], last = paces.at(-1);
  if (paces.length > 2) return (last.at - first.at) / 1000 / (last.step - first.step);
  return facts.elapsed_s !== null && trained > facts.since ? facts.elapsed_s / (trained - facts.since) : null;
}

function stateWords() {
  const of = facts.total === null ? "" : ` of ${facts.total}`;
  const gone = facts.last || lost ? " This page is no longer served; the drawing stays as it is." : "";
  if (lost && facts.state !== "ended") return `No answer: the run, or its page, has ended.${gone}`;
  if (facts.state === "") return "Waiting for the run.";
  if (facts.state === "preparing") return `The run is being prepared.${gone}`;
  if (facts.state === "going on") return `The run is going on.${gone}`;
  if (facts.total !== null && newest >= facts.total) return `The run is done: all ${facts.total} steps.${gone}`;
  return `The run has ended; its last report is of step ${newest}${of}.${gone}`;
}

function placeWords() {
  const of = facts.total === null ? "" : ` of ${facts.total}`;
  const words = [`step ${newest}${of}`];
  const rate = pace();
  if (facts.state === "going on" && !lost && facts.total > newest && rate !== null) {
    words.push(`about ${duration(rate * (facts.total - newest))} left`);
  }
  if (facts.age_s !== null) words.push(`newest report ${duration(facts.age_s)} old`);
  return words.join(", ");
}

/* Only what changed, or a screen reader would say it again and again. */
function say(id, words) {
  if (element(id).textContent !== words) element(id).textContent = words;
}

