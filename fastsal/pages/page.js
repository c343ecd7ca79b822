// Tables that are sorted by a click on the head of a column, or by Enter there. Cells are compared as numbers where both are.
const order = new Intl.Collator("en", { numeric: true });
const valueOf = (row, k) => row.cells[k].dataset.value ?? row.cells[k].textContent.replace("−", "-").trim();

function compare(a, b) {
  const [x, y] = [a, b].map((text) => (text === "" ? NaN : Number(text)));
  if (isNaN(x) || isNaN(y)) return isNaN(y) - isNaN(x) || order.compare(a, b);
  return x < y ? -1 : x > y ? 1 : 0;
}

for (const table of document.querySelectorAll("table")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, k) => {
    const button = document.createElement("button");
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const rows = [...table.tBodies[0].rows];
      rows.sort((a, b) => (down ? -1 : 1) * compare(valueOf(a, k), valueOf(b, k)));
      table.tBodies[0].append(...rows);
    });
  });
}
