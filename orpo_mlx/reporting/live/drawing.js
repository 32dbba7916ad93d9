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
  /* What no split has reported, as a win rate without a judge, would be a row of dashes. */
  const reported = (number, key) => series.some((one) => one.chart === number && one.key === key && one.steps.length > 0);
  const rows = charts.flatMap((chart, number) => chart.keys.filter((key) => reported(number, key)).map((key) => {
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
