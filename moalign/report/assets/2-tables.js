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
