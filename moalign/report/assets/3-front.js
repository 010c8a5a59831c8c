// The fronts as a chart that answers to pointer and keyboard.

const SIZE = { width: 860, height: 520, left: 60, right: 16, top: 14, bottom: 48 };

const visible = () => judged.filter((row) => !state.hidden.has(row.label) && inFamily(row.label));

function ticks(low, high, count) {
  const rough = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= rough);
  const values = [];
  for (let tick = Math.ceil(low / step) * step; tick <= high + 1e-9; tick += step) values.push(Number(tick.toFixed(10)));
  return values;
}

// All of the means with room for an interval of middle length; of longer ones what lies there: a few noisy points would
// shrink all others.
function scale(axis, from, to) {
  const points = visible().flatMap((row) => row.points);
  const lengths = points.map((point) => point.ci[axis][1] - point.ci[axis][0]).sort((a, b) => a - b);
  const middle = lengths[Math.floor(lengths.length / 2)];
  const values = points.flatMap((point) => [point.mean[axis] - middle, point.mean[axis] + middle]);
  if (record.optimum) values.push(...record.optimum.points.map((point) => point[axis]));
  let [low, high] = [Math.min(...values), Math.max(...values)];
  if (!values.length) [low, high] = [0, 1];
  const room = 0.05 * (high - low || 1);
  [low, high] = [low - room, high + room];
  const at = (value) => from + ((Math.min(high, Math.max(low, value)) - low) / (high - low)) * (to - from);
  return { at, low, high };
}

function front() {
  const svg = $("front");
  const focused = [...svg.querySelectorAll(".mark")].indexOf(document.activeElement);
  svg.setAttribute("viewBox", `0 0 ${SIZE.width} ${SIZE.height}`);
  const x = scale(state.x, SIZE.left, SIZE.width - SIZE.right);
  const y = scale(state.y, SIZE.height - SIZE.bottom, SIZE.top);
  svg.replaceChildren(...frame(x, y));
  if (record.optimum) svg.append(...optimum(x, y));
  for (const row of visible()) svg.append(method(row, x, y));
  // Who has chosen a mark by keyboard goes on from there.
  if (focused >= 0) svg.querySelectorAll(".mark")[focused]?.focus({ preventScroll: true });
}

function frame(x, y) {
  const [left, right, top, bottom] = [SIZE.left, SIZE.width - SIZE.right, SIZE.top, SIZE.height - SIZE.bottom];
  const middle = (top + bottom) / 2;
  const upright = (at, style) => shape("line", { x1: at, x2: at, y1: top, y2: bottom, class: style });
  const level = (at, style) => shape("line", { x1: left, x2: right, y1: at, y2: at, class: style });
  const write = (text, where) => shape("text", where, text);
  const parts = [];
  for (const tick of ticks(x.low, x.high, 12)) {
    parts.push(upright(x.at(tick), "grid"));
    parts.push(write(String(tick), { x: x.at(tick), y: bottom + 16, "text-anchor": "middle", class: "tick" }));
  }
  for (const tick of ticks(y.low, y.high, 8)) {
    parts.push(level(y.at(tick), "grid"));
    parts.push(write(String(tick), { x: left - 6, y: y.at(tick) + 4, "text-anchor": "end", class: "tick" }));
  }
  const [rx, ry] = [record.ref[state.x], record.ref[state.y]];
  if (rx > x.low && rx < x.high) parts.push(upright(x.at(rx), "ref"));
  if (ry > y.low && ry < y.high) parts.push(level(y.at(ry), "ref"));
  const [across, up] = [state.x, state.y].map((axis) => `${record.objectives[axis]} (normalised)`);
  const turned = { x: 16, y: middle, "text-anchor": "middle", transform: `rotate(-90 16 ${middle})` };
  parts.push(level(bottom, "axis"), upright(left, "axis"), write(up, turned));
  parts.push(write(across, { x: (left + right) / 2, y: bottom + 38, "text-anchor": "middle" }));
  return parts;
}

function optimum(x, y) {
  const points = record.optimum.points.map((point) => [x.at(point[state.x]), y.at(point[state.y])]);
  if (!two) return points.map(([cx, cy]) => shape("circle", { cx, cy, r: 3.5, class: "optimum" }));
  points.sort((a, b) => a[0] - b[0]);
  return [shape("path", { d: "M" + points.map((p) => p.join(",")).join("L"), class: "optimum" })];
}

function method(row, x, y) {
  const group = shape("g");
  const { hue, dashes, mark: outline, fill } = lookOf(row);
  const at = (point) => [x.at(point.mean[state.x]), y.at(point.mean[state.y])];
  const ordered = [...row.points].sort((a, b) => a.prefs[0] - b.prefs[0]);
  const line = "M" + ordered.map((point) => at(point).join(",")).join("L");
  if (two) group.append(shape("path", { d: line, class: `join s${hue}`, "stroke-dasharray": dashes }));
  for (const point of row.points) {
    const [cx, cy] = at(point);
    const [across, up] = [point.ci[state.x].map(x.at), point.ci[state.y].map(y.at)];
    group.append(shape("line", { x1: across[0], x2: across[1], y1: cy, y2: cy, class: `bar s${hue}` }));
    group.append(shape("line", { x1: cx, x2: cx, y1: up[0], y2: up[1], class: `bar s${hue}` }));
  }
  const chosen = nearest(row.points.map((p) => p.prefs), record.grid[state.preference]).index;
  row.points.forEach((point, index) => {
    const [cx, cy] = at(point);
    const place = `translate(${cx} ${cy})`;
    if (index === chosen) group.append(shape("circle", { cx, cy, r: 9, class: "ring" }));
    const mark = shape("path", {
      d: outline, transform: place, class: `mark ${fill}`, tabindex: "0", role: "button",
      "aria-label": describe(row, point),
    });
    listen(mark, describe(row, point), () => prefer(nearest(record.grid, point.prefs).index));
    group.append(mark);
  });
  return group;
}

// Pointing at a mark and reaching it by keyboard do the same.
function listen(mark, text, choose) {
  mark.addEventListener("pointerenter", (event) => tip(text, event.clientX, event.clientY));
  mark.addEventListener("pointerleave", () => tip(null));
  mark.addEventListener("focus", () => {
    const box = mark.getBoundingClientRect();
    tip(text, box.right, box.bottom);
  });
  mark.addEventListener("blur", () => tip(null));
  mark.addEventListener("click", choose);
  mark.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" && event.key !== " ") return;
    event.preventDefault();
    choose();
  });
}

function describe(row, point) {
  const line = (name, i) => `${name} ${number(point.mean[i])} ${interval(point.ci[i])}, raw ${number(point.raw[i])}`;
  const lines = record.objectives.map(line);
  const gained = `utility ${number(dot(point.prefs, point.mean))}`;
  return [`${row.label} at ${weights(point.prefs)}`, ...lines, gained].join("\n");
}

function tip(text, left, top) {
  const box = $("tip");
  box.hidden = text === null;
  if (text === null) return;
  box.textContent = text;
  box.style.left = `${Math.min(left + 14, window.innerWidth - box.offsetWidth - 8)}px`;
  box.style.top = `${Math.min(top + 14, window.innerHeight - box.offsetHeight - 8)}px`;
}

function legend() {
  for (const row of judged) {
    const label = element("label", null, { "data-label": row.label });
    const box = element("input", null, { type: "checkbox", checked: "" });
    box.addEventListener("change", () => {
      if (box.checked) state.hidden.delete(row.label);
      else state.hidden.add(row.label);
      front();
      cards();
    });
    label.append(box, swatch(row), element("span", `${row.label} ${number(row.hypervolume)}`));
    $("legend").append(label);
  }
  if (!record.optimum) return;
  const onGrid = record.rows.some((row) => row.status !== "failed" && !row.own_preferences);
  const value = onGrid ? ` ${number(record.optimum.hypervolume)}` : "";
  $("legend").append(element("span", `grey: exact optimum${value}`, { class: "note" }));
}

function axes() {
  if (two) return;
  for (const axis of ["x", "y"]) {
    const choice = element("select", null, { "aria-label": `objective on the ${axis} axis` });
    record.objectives.forEach((name, i) => choice.append(element("option", name, { value: i })));
    choice.value = state[axis];
    choice.addEventListener("change", () => {
      state[axis] = Number(choice.value);
      front();
    });
    const label = element("label", `${axis}: `);
    label.append(choice);
    $("axes").append(label);
  }
}
