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
    if ("fixed" in head.dataset) return;
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

// The rows that contain what is searched for and have every tag that is chosen.
for (const form of document.querySelectorAll(".filter")) {
  const rows = [...form.nextElementSibling.querySelector("tbody").rows];
  const show = () => {
    const text = form.querySelector("input").value.toLowerCase();
    const tags = [...form.querySelectorAll("select")].map((select) => select.value).filter(Boolean);
    for (const row of rows) {
      const has = (row.dataset.tags ?? "").split(" ");
      row.hidden = !(row.textContent.toLowerCase().includes(text) && tags.every((tag) => has.includes(tag)));
    }
    form.querySelector("output").value = `${rows.filter((row) => !row.hidden).length} of ${rows.length}`;
  };
  form.addEventListener("input", show);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.hidden = false;
  show();
}
