// The tables: leaderboard, paired differences, cost, diagnostics, numbers of papers; and the words around them.

// A column: heading, value of a row (for sorting), text of a row (default: the value), and whether it is text.
function fill(table, columns, rows, sortable = false, classOf = () => "") {
  const head = table.createTHead().insertRow();
  const body = table.createTBody();
  const draw = (ordered) => {
    body.replaceChildren();
    for (const row of ordered) {
      const line = body.insertRow();
      line.className = classOf(row);
      for (const column of columns) {
        const cell = line.insertCell();
        cell.textContent = column.text ? column.text(row) : missing(column.value(row)) ? NONE : column.value(row);
        if (column.left) cell.className = column.wide ? "text wide" : "text";
      }
    }
  };
  for (const column of columns) {
    const cell = element("th", sortable ? null : column.name, { scope: "col" });
    if (column.left) cell.className = "text";
    if (sortable) {
      const button = element("button", column.name, { type: "button" });
      button.addEventListener("click", () => {
        const down = cell.getAttribute("aria-sort") ? cell.getAttribute("aria-sort") === "ascending" : !column.up;
        head.querySelectorAll("th").forEach((other) => other.removeAttribute("aria-sort"));
        cell.setAttribute("aria-sort", down ? "descending" : "ascending");
        draw(sorted(rows, column.value, down));
      });
      cell.append(button);
    }
    head.append(cell);
  }
  draw(rows);
}

function sorted(rows, value, down) {
  const order = (a, b) => {
    const [x, y] = [value(a), value(b)];
    if (missing(x) || missing(y)) return missing(x) - missing(y); // what is missing goes last, either way
    const greater = typeof x === "string" ? x.localeCompare(y) : x - y;
    return down ? -greater : greater;
  };
  return [...rows].sort(order);
}

const NAME = { name: "method", value: (r) => r.label, up: true, left: true };

// A column whose text is its value, written by a function; ``up``: small values are good, so they come first.
const column = (name, value, write, up = false) => ({ name, value, text: (row) => write(value(row)), up });

// KL to base in nats; some rows only know an upper bound, records of older versions nothing.
const KL = {
  name: "KL to base",
  value: (r) => r.quality?.kl,
  text: (r) => (r.quality?.kl_bound && !missing(r.quality.kl) ? "≤ " : "") + number(r.quality?.kl, 2),
  up: true,
};
const moved = () => record.rows.some((row) => !missing(row.quality?.kl));

function board() {
  const known = record.rows.some((row) => !missing(row.optimal_share));
  const many = record.rows.some((row) => row.seeds.length > 1);
  const of = (name) => (row) => row.indicators?.[name];
  const spacing = (row) => (row.front >= 2 ? row.indicators?.spacing : null); // of one point it says nothing
  const tokens = (row) => (row.cost ? row.cost.tokens_generated + row.cost.tokens_trained : null);
  const each = (row) => row.hypervolume_by_seed.map((value) => number(value)).join(", ");
  const columns = [
    { name: "#", value: (r) => r.rank, up: true },
    { ...NAME, text: (r) => r.label + (r.status === "done" ? "" : ` (${r.status})`) },
    column("hypervolume", (r) => r.hypervolume, (v) => number(v, 4)),
    { name: "interval", value: (r) => r.ci?.[0], text: (r) => interval(r.ci, 4) },
    known && column("% of optimum", (r) => r.optimal_share, percent),
    many && { name: "each seed", value: (r) => r.hypervolume_by_seed[0], text: each },
    column("tau", of("tau"), (v) => number(v, 2)),
    column("inner product", of("inner_product"), number),
    column("expected utility", of("expected_utility"), number),
    known && column("regret", of("regret"), number, true),
    column("IGD+", of("igd_plus"), number, true),
    column("spacing", spacing, number, true),
    column("collapsed", (r) => r.quality?.rate, percent, true),
    moved() && KL,
    column("time", (r) => r.cost?.seconds, duration, true),
    column("tokens", tokens, count, true),
  ];
  const look = (row) => (row.status === "failed" ? "failed" : row.label === record.winner ? "winner" : "");
  fill($("board"), columns.filter(Boolean), record.rows, true, look);
}

function pairs() {
  fill($("pairs"), [
    { name: "method", value: (p) => p.a, left: true },
    { name: "against", value: (p) => p.b, left: true },
    { name: "difference", value: (p) => p.difference, text: (p) => signed(p.difference, 4) },
    { name: "interval", value: (p) => p.ci[0], text: (p) => interval(p.ci, 4) },
    { name: "reflected", value: (p) => p.ci_reflected[0], text: (p) => interval(p.ci_reflected, 4) },
    { name: "better in", value: (p) => p.p_improve, text: (p) => percent(p.p_improve) },
    { name: "certain", value: (p) => (p.certain ? "yes" : "no") },
  ], record.pairs);
}

function cost() {
  const perMinute = (row) => (missing(row.hypervolume_per_cost.seconds) ? null : 60 * row.hypervolume_per_cost.seconds);
  fill($("cost"), [
    NAME,
    column("time", (r) => r.cost.seconds, duration, true),
    column("tokens generated", (r) => r.cost.tokens_generated, count, true),
    column("tokens trained on", (r) => r.cost.tokens_trained, count, true),
    column("reward calls", (r) => r.cost.reward_calls, count, true),
    column("peak memory", (r) => r.cost.peak_memory_bytes, memory, true),
    column("answering: tokens", (r) => r.cost.answering.tokens_generated, count, true),
    column("answering: reward calls", (r) => r.cost.answering.reward_calls, count, true),
    column("hypervolume per minute", perMinute, number),
    column("collapsed", (r) => r.quality.rate, percent, true),
    column("mean length", (r) => r.quality.mean_length, (v) => number(v, 1)),
    column("distinct-3", (r) => r.quality.distinct_3, number),
    moved() && KL,
  ].filter(Boolean), judged, true);
}

function generalisation() {
  const sides = (row) => Object.entries(row.generalisation || {}).map(([side, numbers]) => ({ row, side, numbers }));
  const lines = judged.flatMap(sides);
  $("s-held").hidden = !lines.length;
  fill($("held"), [
    { name: "method", value: (l) => l.row.label, left: true },
    { name: "preferences", value: (l) => l.side.replace("_", " "), left: true },
    column("how many", (l) => l.numbers.preferences, String),
    column("hypervolume", (l) => l.numbers.hypervolume, (v) => number(v, 4)),
    column("% of optimum", (l) => l.numbers.optimal_share, percent),
    column("utility, % of optimum", (l) => l.numbers.utility_share, percent),
    column("tau", (l) => l.numbers.tau, (v) => number(v, 2)),
    column("inner product", (l) => l.numbers.inner_product, number),
  ], lines);
  const gaps = judged.filter((row) => !missing(row.gap));
  $("s-gap").hidden = !gaps.length;
  fill($("gap"), [NAME, column("gap", (r) => r.gap, (v) => signed(v, 4))], gaps);
}

function diagnostics() {
  const measured = (row) => Object.entries(row.diagnostics || {}).map(([name, value]) => ({ row, name, value }));
  const lines = judged.flatMap(measured);
  $("s-diagnostics").hidden = !lines.length;
  fill($("diagnostics"), [
    { name: "method", value: (l) => l.row.label, left: true },
    { name: "quantity", value: (l) => l.name, left: true },
    column("value", (l) => l.value, (v) => (missing(v) ? NONE : String(Number(v.toPrecision(4))))),
  ], lines);
}

function reported() {
  $("s-reported").hidden = !(record.reported || []).length;
  fill($("reported"), [
    { name: "method", value: (r) => r.method, left: true },
    { name: "metric", value: (r) => r.metric, left: true, wide: true },
    { name: "value", value: (r) => r.value },
    { name: "setting", value: (r) => r.setting, left: true, wide: true },
    { name: "source", value: (r) => r.source, left: true, wide: true },
  ], record.reported || []);
}


function words() {
  $("description").textContent = record.description;
  for (const sentence of record.verdict) $("verdict").append(element("p", sentence));
  const parts = [
    `Objectives: ${record.objectives.join(", ")}, normalised by the task card (${record.card_hash}).`,
    `Reference point (${record.ref.join(", ")}); ${record.grid.length} preferences; ${record.prompts} prompts; ` +
      `${record.draws} paired resamples.`,
  ];
  if (record.optimum) parts.push(`Hypervolume of the exact optimum: ${number(record.optimum.hypervolume, 4)}.`);
  if (record.sensitivity) {
    const { ref, flips, ranking } = record.sensitivity;
    const turned = flips ? "the ranking changes" : "the ranking stays";
    parts.push(`At the reference point (${ref.join(", ")}) ${turned}: ${ranking.join(", ")}.`);
  }
  $("protocol").textContent = parts.join(" ");
}

function again() {
  $("again").append(element("p", "The whole comparison:"), element("pre", record.command));
  for (const row of record.rows) {
    const more = element("details");
    more.append(element("summary", row.label));
    for (const run of row.runs) {
      more.append(element("pre", run.command));
      if (run.error) more.append(element("p", `failed: ${run.error}`, { class: "warning" }));
      const by = run.made && `run ${run.run_id}, seed ${run.seed}: ${made(run.made)}`;
      if (by) more.append(element("p", by, { class: "note" }));
    }
    $("again").append(more);
  }
}

function made(by) {
  const commit = by.commit ? `commit ${by.commit.slice(0, 12)}${by.dirty ? " with changes" : ""}` : "no commit known";
  const on = (by.gpus || []).join(", ") || by.cpu || "unknown hardware";
  return [`made by moalign ${by.moalign || "?"}`, commit, on].join(", ");
}

function environment() {
  const used = record.environment;
  const packages = Object.entries(used.packages || {}).filter(([, version]) => version);
  const lines = [
    ["commit", used.commit ? used.commit + (used.dirty ? " with changes" : "") : null],
    ["Python", used.python], ["platform", used.platform], ["processor", used.cpu], ["processors", used.cpus],
    ["memory", missing(used.memory_bytes) ? null : `${number(used.memory_bytes / 2 ** 30, 1)} GiB`],
    ["GPUs", (used.gpus || []).join(", ") || "none"],
    ["packages", packages.map(([name, version]) => `${name} ${version}`).join(", ")],
  ];
  const known = lines.filter(([, value]) => !missing(value));
  $("environment").append(...known.flatMap(([name, value]) => [element("dt", name), element("dd", value)]));
}
