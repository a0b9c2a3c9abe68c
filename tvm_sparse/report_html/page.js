"use strict";

// Searches and sorts the table of all layers.
(() => {
  const table = document.getElementById("layers");
  if (!table) return;
  const body = table.tBodies[0];
  const rows = Array.from(body.rows);

  const search = document.getElementById("search");
  const found = document.getElementById("found");
  search.closest(".tools").hidden = false;
  search.addEventListener("input", () => {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const row of rows) {
      const text = row.textContent.toLowerCase();
      row.hidden = !words.every((word) => text.includes(word));
      if (!row.hidden) shown += 1;
    }
    found.textContent = words.length ? `${shown} of ${rows.length}` : "";
  });

  const key = (row, column) => {
    const cell = row.cells[column];
    if (!cell.textContent) return null;
    return "sort" in cell.dataset ? Number(cell.dataset.sort) : cell.textContent;
  };
  const compare = (a, b) => {
    // What is not known comes last, either way.
    if (a === null || b === null) return (a === null) - (b === null);
    return typeof a === "number" ? a - b : a.localeCompare(b, undefined, { numeric: true });
  };
  Array.from(table.tHead.rows[0].cells).forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent;
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const falls = head.getAttribute("aria-sort") === "ascending";
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", falls ? "descending" : "ascending");
      const keyed = rows.map((row) => [key(row, column), row]);
      keyed.sort(([a], [b]) => (falls && a !== null && b !== null ? compare(b, a) : compare(a, b)));
      body.append(...keyed.map(([, row]) => row));
    });
  });
})();

// Shows one weight at a time.
(() => {
  const weights = Array.from(document.querySelectorAll("details.weight"));
  if (!weights.length) return;
  const picker = document.getElementById("weight");
  for (const weight of weights) {
    const option = document.createElement("option");
    option.value = weight.id;
    option.textContent = weight.querySelector("h3").textContent;
    picker.append(option);
  }
  const show = (id) => {
    if (!weights.some((weight) => weight.id === id)) return;
    picker.value = id;
    for (const weight of weights) {
      weight.hidden = weight.id !== id;
      weight.open = weight.id === id;
    }
  };
  picker.closest(".tools").hidden = false;
  picker.addEventListener("change", () => show(picker.value));
  const follow = () => {
    const id = location.hash.slice(1);
    show(id);
    document.getElementById(id)?.scrollIntoView();
  };
  window.addEventListener("hashchange", follow);
  show((weights.find((weight) => weight.open) || weights[0]).id);
  if (location.hash) follow();
})();
