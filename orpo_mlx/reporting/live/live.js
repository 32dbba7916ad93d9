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

/* ---- drawing ---- */

function node(name, attributes, ...children) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function html(name, words, className = "") {
  const made = document.createElement(name);
  made.textContent = words;
  if (className) made.className = className;
  return made;
}

/* Trailing means over `count` reports. */
function averaged(values, count) {
  if (count === 1) return values;
  const means = [], recent = [];
  let sum = 0;
  for (const value of values) {
    if (Number.isNaN(value)) { means.push(NaN); continue; }
    recent.push(value);
    sum += value;
    if (recent.length > count) sum -= recent.shift();
    means.push(sum / recent.length);
  }
  return means;
}

/* What is drawn of a series from step `from` on. */
function shown(one, from) {
  const start = from > 0 ? after(one.steps, from - 1) : 0;
  const values = one.split === "train" ? averaged(one.values, Number(element("average").value)) : one.values;
  return {...one, steps: one.steps.slice(start), values: values.slice(start)};
}

/* Points for at most `columns` columns: the first, lowest, highest and last of each column. */
function thinned(one, columns) {
  const count = one.steps.length;
  if (count <= 4 * columns) return one.steps.map((step, at) => [step, one.values[at]]);
  const first = one.steps[0], span = one.steps[count - 1] - first || 1, points = [];
  for (let at = 0; at < count;) {
    const column = Math.floor((one.steps[at] - first) / span * columns), start = at;
    let low = at, high = at;
    for (; at < count && Math.floor((one.steps[at] - first) / span * columns) === column; at += 1) {
      if (!(one.values[at] >= one.values[low])) low = at;
      if (!(one.values[at] <= one.values[high])) high = at;
    }
    for (const place of [...new Set([start, low, high, at - 1])].sort((a, b) => a - b)) {
      points.push([one.steps[place], one.values[place]]);
    }
  }
  return points;
}

/* A tick, to the decimal place by which ticks differ. */
function inWords(tick, place, high) {
  if (place >= -4 && high < 1e6) return tick.toFixed(Math.max(0, -place));
  return tick === 0 ? "0" : tick.toExponential(Math.max(0, Math.floor(Math.log10(Math.abs(tick)) + 1e-9) - place));
}

/* Round numbers between two bounds. */
function ticks(low, high, most, whole) {
  const rough = (high - low) / most, power = 10 ** Math.floor(Math.log10(rough));
  let step = power * [1, 2, 5, 10].find((factor) => power * factor >= rough * 0.999);
  if (whole) step = Math.max(1, Math.round(step));
  const found = [];
  for (let tick = Math.ceil(low / step - 1e-9); tick * step <= high + step * 1e-9 && found.length < 20; tick += 1) {
    found.push(tick * step);
  }
  const place = Math.floor(Math.log10(step) + 1e-9);
  return {found, words: found.map((tick) => inWords(tick, place, high))};
}

function bounds(chart, lines) {
  if (charts[chart].factor === 100) return [-3, 103];
  let low = Infinity, high = -Infinity;
  for (const line of lines) {
    for (const value of line.values) {
      if (value < low) low = value;
      if (value > high) high = value;
    }
  }
  if (low > high) return [0, 1];
  const room = (high - low) * 0.05 || Math.abs(high) * 0.05 || 1;
  return [low - room, high + room];
}

function swatch(one) {
  const middle = 5, parts = one.split === "test" ? [] :
    [node("path", {class: `line ${one.split === "valid" ? "dashed" : ""}`, d: `M0 ${middle}H28`})];
  if (one.split === "valid") parts.push(node("circle", {class: "dot", cx: 14, cy: middle, r: 3}));
  if (one.split === "test") parts.push(node("rect", {class: "square", x: 10, y: middle - 3, width: 6, height: 6}));
  return node("svg", {class: `colour${one.colour}`, viewBox: "0 0 28 10", "aria-hidden": "true"}, ...parts);
}

function drawLine(one, x, y, width) {
  const points = thinned(one, Math.max(1, Math.floor(width))), parts = [];
  let path = "", pen = "M";
  for (const [step, value] of points) {
    if (Number.isNaN(value)) { pen = "M"; continue; }
    path += `${pen}${x(step).toFixed(1)} ${y(value).toFixed(1)}`;
    pen = "L";
  }
  if (one.split !== "test" && path) {
    parts.push(node("path", {class: `line ${one.split === "valid" ? "dashed" : ""}`, d: path}));
  }
  const marked = one.split !== "train" || points.length === 1;
  if (marked && points.length <= width / 6) {
    for (const [step, value] of points) {
      if (Number.isNaN(value)) continue;
      const [cx, cy] = [x(step), y(value)];
      parts.push(one.split === "test" ? node("rect", {class: "square", x: cx - 4, y: cy - 4, width: 8, height: 8}) :
        node("circle", {class: "dot", cx, cy, r: 3.5}));
    }
  }
  return node("g", {class: `colour${one.colour}`}, ...parts);
}

function drawChart(number, from, to, cursor) {
  const {figure, plot, values} = panels[number];
  const lines = series.filter((one) => one.chart === number && one.steps.length > 0).map((one) => shown(one, from));
  figure.hidden = lines.length === 0;
  if (figure.hidden) return;
  const width = plot.clientWidth || 320, height = plot.clientHeight || 208;
  const inner = {width: width - MARGIN.left - MARGIN.right, height: height - MARGIN.top - MARGIN.bottom};
  const [low, high] = bounds(number, lines), span = Math.max(1, to - from);
  const x = (step) => MARGIN.left + (step - from) / span * inner.width;
  const y = (value) => MARGIN.top + (high - value) / (high - low) * inner.height;
  const parts = [];
  const rows = ticks(low, high, 6, false);
  rows.found.forEach((tick, at) => {
    parts.push(node("path", {class: "grid", d: `M${MARGIN.left} ${y(tick)}H${width - MARGIN.right}`}));
    parts.push(node("text", {x: MARGIN.left - 6, y: y(tick) + 4, "text-anchor": "end"}, rows.words[at]));
  });
  for (const tick of ticks(from, Math.max(to, from + 1), Math.max(2, Math.floor(inner.width / 90)), true).found) {
    parts.push(node("text", {x: x(tick), y: height - 6, "text-anchor": "middle"}, String(tick)));
  }
  for (const line of lines) parts.push(drawLine(line, x, y, inner.width));
  if (cursor !== null) parts.push(node("path", {class: "cursor", d: `M${x(cursor)} ${MARGIN.top}V${height - MARGIN.bottom}`}));
  plot.replaceChildren(...parts);
  plot.setAttribute("viewBox", `0 0 ${width} ${height}`);
  const read = lines.map((line) => [line, valueAt(line, cursor ?? Infinity)]).filter(([, value]) => value !== null);
  values.replaceChildren(...read.map(([line, value]) => {
    const item = html("span", `${line.label} ${short(value)}`);
    item.prepend(swatch(line));
    return item;
  }));
  const words = read.map(([line, value]) => `${line.label} ${short(value)}`).join(", ");
  plot.setAttribute("aria-label", `${charts[number].title}, ${cursor === null ? "newest" : `at step ${cursor}`}: ${words}`);
}

/* The last finite value at a step or before. */
function valueAt(one, step) {
  let at = after(one.steps, step) - 1;
  while (at >= 0 && Number.isNaN(one.values[at])) at -= 1;
  return at < 0 ? null : one.values[at];
}

function drawTable() {
  say("unread", [
    unread ? `Lines of metrics.jsonl that are no report: ${unread}.` : "",
    notFinite ? `Figures that were not finite, and are gaps in the lines: ${notFinite}.` : "",
  ].filter(Boolean).join(" "));
  const there = splits.filter((split) => series.some((one) => one.split === split && one.steps.length > 0));
  const head = document.createElement("tr");
  for (const words of ["first → newest", ...there]) head.append(Object.assign(html("th", words), {scope: "col"}));
  element("columns").replaceChildren(head);
  const rows = charts.flatMap((chart, number) => chart.keys.map((key) => {
    const row = document.createElement("tr");
    const side = chart.keys.length > 1 ? `, ${key.split("/").at(-1)}` : "";
    row.append(Object.assign(html("th", chart.title + side), {scope: "row"}));
    for (const split of there) {
      const one = series.find((other) => other.chart === number && other.key === key && other.split === split);
      const finite = one.values.filter((value) => !Number.isNaN(value));
      row.append(html("td", finite.length === 0 ? "–" : finite.length === 1 ? short(finite[0]) :
        `${short(finite[0])} → ${short(finite.at(-1))}`));
    }
    return row;
  }));
  element("figures").replaceChildren(...rows);
}

function render() {
  due = false;
  if (!paused()) takeAnswers();
  say("state", stateWords());
  say("place", placeWords());
  document.title = newest > 0 ? `${newest}${facts.total === null ? "" : `/${facts.total}`} ${heading}` : heading;
  const bar = element("bar");
  bar.hidden = facts.total === null || facts.total === 0;
  bar.value = bar.hidden ? 0 : Math.min(1, newest / facts.total);
  const from = Math.floor(newest * (1 - Number(element("range").value)));
  const slider = element("cursor"), follows = Number(slider.value) === Number(slider.max);
  slider.min = from;
  slider.max = newest;
  if (follows) slider.value = newest;
  const cursor = follows ? null : Number(slider.value);
  say("looked", cursor === null ? "newest" : String(cursor));
  charts.forEach((_, number) => drawChart(number, from, newest, cursor));
  drawTable();
  const said = facts.said.join("\n");
  element("saying").hidden = said === "";
  if (element("said").textContent !== said) {
    element("said").textContent = said;
    element("said").scrollTop = element("said").scrollHeight;
  }
}

const paused = () => element("pause").getAttribute("aria-pressed") === "true";

/* Not in a tab that is not seen: there no frame is drawn. */
function draw() {
  if (due) return;
  due = true;
  requestAnimationFrame(render);
}

const panels = charts.map((chart) => {
  const figure = document.createElement("figure"), plot = node("svg", {class: "plot", role: "img"});
  const values = html("p", "", "values");
  figure.append(html("h2", chart.title), values, plot, html("figcaption", chart.caption));
  figure.hidden = true;
  element("charts").append(figure);
  plot.addEventListener("pointermove", (event) => {
    const box = plot.getBoundingClientRect(), slider = element("cursor");
    const share = (event.clientX - box.left - MARGIN.left) / (box.width - MARGIN.left - MARGIN.right);
    slider.value = Math.round(Number(slider.min) + Math.min(1, Math.max(0, share)) * (slider.max - slider.min));
    draw();
  });
  plot.addEventListener("pointerleave", () => { element("cursor").value = element("cursor").max; draw(); });
  return {figure, plot, values};
});

for (const id of ["range", "average", "cursor"]) element(id).addEventListener("input", draw);
element("pause").addEventListener("click", () => {
  element("pause").setAttribute("aria-pressed", String(!paused()));
  draw();
});
element("again").addEventListener("click", follow);
new ResizeObserver(draw).observe(element("charts"));
follow();
