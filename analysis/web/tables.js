// The tables: a click on a heading sorts, the filter hides rows, a button saves the CSV that the page holds.
(() => {
  const UNITS = { s: 1, min: 60, h: 3600 };

  // What a reader sees, as a number: "10.5 ± 1.0" is 10.5, "3 min" 180, "−2" minus two, "–" nothing.
  function number(text) {
    const found = /^([+−-]?)([\d,]*\.?\d+(?:e[+-]?\d+)?)\s*(s|min|h)?(?![a-z])/i.exec(text);
    if (!found) return null;
    const size = Number(found[2].replaceAll(",", "")) * (UNITS[found[3]] || 1);
    return found[1] === "" || found[1] === "+" ? size : -size;
  }

  function compare(a, b) {
    const [left, right] = [number(a), number(b)];
    if (left !== null && right !== null) return left - right;
    return (left === null) - (right === null) || a.localeCompare(b, "en", { numeric: true });
  }

  // Up, down, as it came. What has no value stays last either way.
  function sort(table, heading) {
    const next = { none: "ascending", ascending: "descending", descending: "none" };
    const order = next[heading.getAttribute("aria-sort") || "none"];
    for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
    if (order !== "none") heading.setAttribute("aria-sort", order);
    const rows = Array.from(table.tBodies[0].rows);
    rows.forEach((row, place) => (row.dataset.place ??= place));
    const sign = order === "descending" ? -1 : 1;
    const keys = new Map(rows.map((row) => [row, row.cells[heading.cellIndex].textContent]));
    const empty = (text) => text === "–" || text === "";
    rows.sort((a, b) => {
      const came = a.dataset.place - b.dataset.place;
      if (order === "none") return came;
      const [left, right] = [keys.get(a), keys.get(b)];
      return empty(left) - empty(right) || sign * compare(left, right) || came;
    });
    table.tBodies[0].append(...rows);
  }

  function filter(block) {
    const rows = Array.from(block.querySelectorAll("tr[data-facet]"));
    for (const row of rows) row.hidden = !filters.keep(Number(row.dataset.facet));
    const shown = rows.filter((row) => !row.hidden).length;
    const count = block.querySelector(".count");
    count.textContent = shown < rows.length ? `${shown} of ${rows.length} rows` : "";
  }

  function save(name) {
    const text = JSON.parse(document.getElementById(`csv-${name}`).textContent);
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type: "text/csv" }));
    link.download = `${name}.csv`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
  }

  for (const table of document.querySelectorAll("main table")) {
    for (const heading of table.tHead.rows[0].cells) {
      heading.querySelector("button").addEventListener("click", () => sort(table, heading));
    }
  }
  for (const button of document.querySelectorAll("[data-csv]")) {
    button.addEventListener("click", () => save(button.dataset.csv));
  }
  filters.follow(() => document.querySelectorAll(".block").forEach((block) => block.querySelector(".count") && filter(block)));
  document.documentElement.dataset.ready = "";
})();
