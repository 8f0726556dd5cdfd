"use strict";
// Without this script the page shows the same; with it the tables sort and filter, and commands are copied by a button.
for (const table of document.querySelectorAll("table")) {
  const body = table.tBodies[0], rows = [...body.rows], heads = [...table.tHead.rows[0].cells];
  const number = (row, index) => parseFloat(row.cells[index].textContent.replace(/^[^-+.\d]*/, ""));
  heads.forEach((head, index) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent;
    head.replaceChildren(button);
    const texts = head.className === "text";
    const missing = (row) => row.cells[index].textContent.trim() === "-";
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const compare = (a, b) => missing(a) - missing(b) || (down ? -1 : 1) * (texts
        ? a.cells[index].textContent.localeCompare(b.cells[index].textContent, undefined, { numeric: true })
        : number(a, index) - number(b, index));
      body.append(...[...rows].sort(compare));
    });
  });
  const filter = table.closest("section").querySelector(`input[data-table="${table.id}"]`);
  filter.parentElement.hidden = false;
  filter.addEventListener("input", () => {
    const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const row of rows) {
      const text = row.textContent.toLowerCase();
      row.hidden = !words.every((word) => text.includes(word));
      shown += !row.hidden;
    }
    filter.parentElement.querySelector("output").textContent = words.length ? `${shown} of ${rows.length} rows` : "";
  });
}
for (const pre of document.querySelectorAll("pre.command")) {
  const button = document.createElement("button");
  button.type = "button";
  button.className = "copy";
  button.textContent = "Copy";
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(pre.textContent);
      button.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(pre);
      button.textContent = "Selected: press Ctrl+C";
    }
  });
  pre.before(button);
}
