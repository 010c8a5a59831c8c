// A heading sorts its table by what the cells carry for it (data-key); what is missing goes last, either way.
function sortable(table) {
  const rows = [...table.tBodies[0].rows];
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, index) => {
    head.querySelector("button").addEventListener("click", () => {
      const before = head.getAttribute("aria-sort");
      const down = before ? before === "ascending" : !("rising" in head.dataset);
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      table.tBodies[0].replaceChildren(...sorted(rows, index, down));
    });
  });
}

function sorted(rows, index, down) {
  const key = (row) => row.cells[index].dataset.key;
  const order = (a, b) => {
    const [x, y] = [key(a), key(b)];
    if (missing(x) || missing(y)) return missing(x) - missing(y);
    const greater = isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y;
    return down ? -greater : greater;
  };
  return [...rows].sort(order);
}

const familyOf = new Map(record.rows.map((row) => [row.label, row.family]));
const inFamily = (label) => !state.family || familyOf.get(label) === state.family;

// One family of methods, in every table and chart, where there are several. A pair stays if one of its two is of it.
function families() {
  const names = [...new Set(judged.map((row) => row.family))].filter(Boolean);
  if (names.length < 2) return;
  const choice = element("select", null, { id: "family" });
  choice.append(element("option", "all methods", { value: "" }), ...names.map((name) => element("option", name)));
  choice.addEventListener("change", () => {
    state.family = choice.value;
    for (const row of document.querySelectorAll("tr[data-rows]")) {
      const labels = JSON.parse(row.dataset.rows).filter((label) => familyOf.has(label));
      row.hidden = labels.length > 0 && !labels.some(inFamily);
    }
    for (const label of document.querySelectorAll("[data-label]")) label.hidden = !inFamily(label.dataset.label);
    front();
    cards();
    believedCharts();
  });
  const label = element("label", "show ");
  label.append(choice);
  $("families").append(label);
}
