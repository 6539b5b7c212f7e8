"use strict";
const tips = JSON.parse(document.getElementById("tips").textContent);
const box = document.getElementById("tip");
let shown = null;

function twins(key) {
  return document.querySelectorAll(`[data-tip="${CSS.escape(key)}"], [data-row="${CSS.escape(key)}"]`);
}

function show(key, x, y) {
  if (key !== shown) {
    hide();
    shown = key;
    box.textContent = tips[key] || key;
    box.hidden = false;
    twins(key).forEach((mark) => mark.classList.add("on"));
  }
  const left = Math.min(x + 14, innerWidth - box.offsetWidth - 8);
  const top = y + 18 + box.offsetHeight > innerHeight ? y - box.offsetHeight - 10 : y + 18;
  box.style.left = `${Math.max(8, left)}px`;
  box.style.top = `${Math.max(8, top)}px`;
}

function hide() {
  if (shown === null) return;
  twins(shown).forEach((mark) => mark.classList.remove("on"));
  shown = null;
  box.hidden = true;
}

// Marks are small and curves thin, so look around the pointer too.
const around = [[0, 0]];
for (const radius of [3, 6]) {
  for (let k = 0; k < 8; k++) {
    around.push([radius * Math.cos(k * Math.PI / 4), radius * Math.sin(k * Math.PI / 4)]);
  }
}
document.querySelectorAll("figure svg").forEach((svg) => {
  svg.addEventListener("mousemove", (event) => {
    for (const [dx, dy] of around) {
      const hit = document.elementFromPoint(event.clientX + dx, event.clientY + dy);
      const mark = hit && hit.closest("[data-tip]");
      if (mark) return show(mark.dataset.tip, event.clientX, event.clientY);
    }
    hide();
  });
  svg.addEventListener("mouseleave", hide);
  svg.addEventListener("focusin", (event) => {
    const mark = event.target.closest("[data-tip]");
    const at = mark && mark.getBoundingClientRect();
    if (mark) show(mark.dataset.tip, at.right, at.bottom);
  });
  svg.addEventListener("focusout", hide);
});
document.querySelectorAll("tr[data-row]").forEach((row) => {
  row.addEventListener("mouseenter", () => twins(row.dataset.row).forEach((m) => m.classList.add("on")));
  row.addEventListener("mouseleave", () => twins(row.dataset.row).forEach((m) => m.classList.remove("on")));
});

document.querySelectorAll("table").forEach((table) => {
  table.querySelectorAll("th").forEach((head, column) => {
    head.addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      const key = (cell) => cell.dataset.key ?? cell.textContent.trim().replaceAll(",", "");
      const numeric = (text) => text.trim() !== "" && !Number.isNaN(Number(text));
      const rows = [...table.tBodies[0].rows].map((row) => [key(row.cells[column]), row]);
      rows.sort(([s], [t]) => {
        if ((s === "") !== (t === "")) return s === "" ? 1 : -1;  // empty cells stay last
        const order = numeric(s) && numeric(t) ? s - t : s.localeCompare(t);
        return up ? order : -order;
      });
      table.querySelectorAll("th").forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      table.tBodies[0].append(...rows.map(([, row]) => row));
    });
  });
});
