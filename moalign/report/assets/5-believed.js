// Rewards that were trained on (believed) and the judge's (true): against each other, and both over KL to base.

const BELIEVED = { hypervolume: "hypervolume", inner_product: "inner product" };
const NATS = [0, 0.1, 0.5, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024];
const PANEL = { width: 430, height: 330, left: 52, right: 14, top: 14, bottom: 44 };

const trueOf = (row, quantity) => (quantity === "hypervolume" ? row.hypervolume : row.indicators[quantity]);

function believedCharts() {
  if (!$("quantity")) return;
  const quantity = $("quantity").value;
  const rows = judged.filter((row) => row.believed && inFamily(row.label));
  const name = BELIEVED[quantity];
  const points = rows.map((row) => ({
    row, believed: row.believed[quantity], truth: trueOf(row, quantity), kl: row.quality.kl,
  }));
  const nats = (row) => `${row.quality.kl_bound ? "≤ " : ""}${number(row.quality.kl, 2)} nats`;
  const say = ({ row, believed, truth }) =>
    `${row.label}\nbelieved ${name} ${number(believed)}, true ${number(truth)}\nKL to base ${nats(row)}`;
  const across = range(points.map((point) => point.believed));
  const up = range(points.map((point) => point.truth));
  const [low, high] = [Math.max(across[0], up[0]), Math.min(across[1], up[1])];
  const even = ticks(...across, 6).map((at) => [at, at]);
  panel("believed-true", across, even, up, [`believed ${name}`, `true ${name}`], (x, y) => [
    ...(low < high ? [shape("line", { x1: x(low), y1: y(low), x2: x(high), y2: y(high), class: "ref" })] : []),
    ...points.map((point) => spot(x(point.believed), y(point.truth), lookOf(point.row), lookOf(point.row).fill, say(point))),
  ]);
  const known = points.filter((point) => !missing(point.kl));
  const root = (kl) => Math.sqrt(Math.max(0, kl));
  const most = Math.max(1, ...known.map((point) => point.kl));
  const end = 1.06 * root(most);
  const marked = [];  // As in the figures: far enough from each other to be read.
  for (const kl of NATS) {
    if (root(kl) <= end && !(marked.length && root(kl) - marked.at(-1)[0] < end / 14)) marked.push([root(kl), kl]);
  }
  const both = range(known.flatMap((point) => [point.believed, point.truth]));
  const names = ["KL to base, nats per response (square-root axis)", name];
  panel("believed-kl", [0, end], marked, both, names, (x, y) =>
    known.flatMap((point) => {
      const [at, look] = [x(root(point.kl)), lookOf(point.row)];
      const mark = (value, fill) => spot(at, y(value), look, fill, say(point));
      return [
        shape("line", { x1: at, x2: at, y1: y(point.believed), y2: y(point.truth), class: `bar s${look.hue}` }),
        mark(point.believed, `hollow s${look.hue}`), mark(point.truth, `f${look.hue}`),
      ];
    }),
  );
}

function range(values) {
  const [low, high] = values.length ? [Math.min(...values), Math.max(...values)] : [0, 1];
  const room = 0.1 * (high - low || 1);
  return [low - room, high + room];
}

function spot(x, y, look, fill, text) {
  const place = `translate(${x} ${y})`;
  const attributes = { d: look.mark, transform: place, class: `mark ${fill}`, tabindex: "0", role: "img" };
  const made = shape("path", { ...attributes, "aria-label": text });
  listen(made, text, () => {});
  return made;
}

function panel(id, across, marked, up, names, marks) {
  const { width, height, left, right, top, bottom } = PANEL;
  const [end, ground] = [width - right, height - bottom];
  const x = (value) => left + ((value - across[0]) / (across[1] - across[0])) * (end - left);
  const y = (value) => ground - ((value - up[0]) / (up[1] - up[0])) * (ground - top);
  const svg = $(id);
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  const parts = [];
  for (const [tick, written] of marked) {
    parts.push(shape("line", { x1: x(tick), x2: x(tick), y1: top, y2: ground, class: "grid" }));
    parts.push(shape("text", { x: x(tick), y: ground + 16, "text-anchor": "middle", class: "tick" }, String(written)));
  }
  for (const tick of ticks(...up, 6)) {
    parts.push(shape("line", { x1: left, x2: end, y1: y(tick), y2: y(tick), class: "grid" }));
    parts.push(shape("text", { x: left - 6, y: y(tick) + 4, "text-anchor": "end", class: "tick" }, String(tick)));
  }
  parts.push(shape("line", { x1: left, x2: end, y1: ground, y2: ground, class: "axis" }));
  parts.push(shape("line", { x1: left, x2: left, y1: top, y2: ground, class: "axis" }));
  parts.push(shape("text", { x: (left + end) / 2, y: height - 6, "text-anchor": "middle" }, names[0]));
  const turn = `translate(13 ${(top + ground) / 2}) rotate(-90)`;
  parts.push(shape("text", { transform: turn, "text-anchor": "middle" }, names[1]));
  svg.replaceChildren(...parts, ...marks(x, y));
}

function believed() {
  const place = $("believed-of");
  if (!place) return;
  const choice = element("select", null, { id: "quantity", "aria-label": "quantity" });
  for (const [value, name] of Object.entries(BELIEVED)) choice.append(element("option", name, { value }));
  choice.addEventListener("change", believedCharts);
  const key = element("span", null, { class: "controls" });
  for (const row of judged.filter((row) => row.believed)) {
    const label = element("label", null, { "data-label": row.label });
    label.append(swatch(row), element("span", row.label));
    key.append(label);
  }
  place.append(choice, key);
  believedCharts();
}
