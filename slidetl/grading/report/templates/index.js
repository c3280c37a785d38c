"use strict";
// Sorts the table by the column whose heading is pressed, again the other way round; empty cells stay last.
(() => {
  const table = document.getElementById("slides");
  const body = table.tBodies[0];
  const order = new Intl.Collator(undefined, { numeric: true });

  for (const heading of table.tHead.rows[0].cells) {
    heading.querySelector("button")?.addEventListener("click", () => {
      const direction = heading.ariaSort === "ascending" ? -1 : 1;
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      heading.ariaSort = direction === 1 ? "ascending" : "descending";
      const key = (row) => row.cells[heading.cellIndex].dataset.sort ?? "";
      const rows = [...body.rows].sort((one, other) => {
        const [a, b] = [key(one), key(other)];
        if (a === "" || b === "") return (a === "") - (b === "");
        const numbers = Number(a) - Number(b);
        return direction * (Number.isNaN(numbers) ? order.compare(a, b) : numbers);
      });
      body.append(...rows);
    });
  }
})();
