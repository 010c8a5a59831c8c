// What each method answers at the chosen preference and prompt, side by side.

function nearest(preferences, preference) {
  let [index, least] = [0, Infinity];
  preferences.forEach((candidate, i) => {
    const far = candidate.reduce((sum, w, j) => sum + Math.abs(w - preference[j]), 0);
    if (far < least - 1e-12) [index, least] = [i, far];
  });
  return { index, exact: least < 1e-6 };
}

function chooser() {
  const place = $("chooser");
  const label = element("label", "preference ");
  if (two) {
    const slider = element("input", null, { type: "range", id: "slider", min: 0, max: record.grid.length - 1, step: 1 });
    slider.addEventListener("input", () => prefer(Number(slider.value)));
    label.append(slider, element("output", null, { id: "asked", for: "slider" }));
  } else {
    const choice = element("select", null, { id: "slider" });
    record.grid.forEach((preference, i) => choice.append(element("option", named(preference), { value: i })));
    choice.addEventListener("change", () => prefer(Number(choice.value)));
    label.append(choice);
    if (record.objectives.length === 3) place.append(picker());
  }
  place.append(label);
}

// Three objectives: the grid as a triangle to click on; the list beside it does the same by keyboard.
function picker() {
  const corners = [[8, 104], [112, 104], [60, 14]];
  const svg = shape("svg", { id: "picker", viewBox: "-40 -4 200 132", role: "radiogroup", "aria-label": "preference" });
  svg.append(shape("path", { d: "M8,104L112,104L60,14z" }));
  record.objectives.forEach((name, i) => {
    const [x, y] = corners[i];
    svg.append(shape("text", { x, y: i === 2 ? y - 6 : y + 16, "text-anchor": "middle" }, name));
  });
  record.grid.forEach((preference, i) => {
    const [cx, cy] = [0, 1].map((axis) => dot(preference, corners.map((corner) => corner[axis])));
    const spot = shape("circle", { cx, cy, r: 4.5, role: "radio", "aria-label": named(preference) });
    spot.addEventListener("click", () => prefer(i));
    svg.append(spot);
  });
  return svg;
}

function prompts() {
  const choice = element("select", null, { id: "which", "aria-label": "prompt" });
  const name = (prompt, i) => `${i + 1}: ${prompt.slice(0, 90)}`;
  choice.append(...answers.prompts.map((prompt, i) => element("option", name(prompt, i), { value: i })));
  const go = (to) => {
    state.prompt = (to + answers.prompts.length) % answers.prompts.length;
    choice.value = state.prompt;
    show();
  };
  choice.addEventListener("change", () => go(Number(choice.value)));
  const step = (text, by, name) => {
    const button = element("button", text, { type: "button", "aria-label": name });
    button.addEventListener("click", () => go(state.prompt + by));
    return button;
  };
  $("prompts").append(step("‹", -1, "previous prompt"), choice, step("›", 1, "next prompt"));
  choice.value = state.prompt;
}

function prefer(index) {
  state.preference = index;
  show();
  front();
}

function show() {
  const preference = record.grid[state.preference];
  const slider = $("slider");
  slider.value = state.preference;
  slider.setAttribute("aria-valuetext", named(preference));
  if ($("asked")) $("asked").textContent = named(preference);
  const spots = document.querySelectorAll("#picker circle");
  spots.forEach((spot, i) => spot.setAttribute("aria-checked", i === state.preference));
  cards();
  // A file cannot be written, but its address can be kept: the same link shows the same place.
  history.replaceState(null, "", `#preference=${state.preference}&prompt=${state.prompt}`);
}

function cards() {
  if (!answers) return;
  $("prompt").textContent = answers.prompts[state.prompt];
  $("cards").replaceChildren(...visible().filter((row) => answers.rows[row.label]).map(card));
}

function card(row) {
  const answered = answers.rows[row.label];
  const preference = record.grid[state.preference];
  const { index, exact } = nearest(answered.preferences, preference);
  const raw = answered.scores[index][state.prompt];
  const article = element("article", null, { class: "card", "aria-label": row.label });
  const head = element("h3");
  head.append(swatch(row), element("span", row.label));
  article.append(head);
  const instead = `it answers for its nearest preference, ${weights(answered.preferences[index])}`;
  if (!exact) article.append(element("p", instead, { class: "note" }));
  article.append(element("div", answers.texts[answered.texts[index][state.prompt]], { class: "answer" }));
  const scores = element("div", null, { class: "scores" });
  const { lo, hi } = record.bounds;
  const unit = raw.map((value, i) => (missing(value) ? null : (value - lo[i]) / (hi[i] - lo[i])));
  const asked = unit.some(missing) ? null : dot(preference, unit);
  const text = (i) => `${number(unit[i])} (raw ${number(raw[i], 2)})`;
  scores.append(...record.objectives.map((name, i) => score(name, unit[i], text(i))));
  scores.append(score("w·n", asked, number(asked)));
  article.append(scores);
  return article;
}

function score(name, value, text) {
  const line = element("div", null, { class: "score" });
  const track = element("span", null, { class: "track" });
  const bar = element("div", null, { class: "fill" });
  bar.style.width = `${missing(value) ? 0 : 100 * Math.min(1, Math.max(0, value))}%`;
  track.append(bar);
  line.append(element("span", name, { title: name }), track, element("span", text));
  return line;
}

async function unpack() {
  const block = $("answers");
  if (block.dataset.packed !== "gzip") return JSON.parse(block.textContent);
  const bytes = Uint8Array.from(atob(block.textContent), (char) => char.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}
