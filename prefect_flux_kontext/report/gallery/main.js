// Search and filters. Loaded last: it shows the first rows.

(() => {
  const hidden = new Set();
  const all = columns.id.map((_, row) => row);
  const ids = columns.id.map((id) => id.toLowerCase());

  function filter() {
    const wanted = byId("search").value.trim().toLowerCase();
    const style = byId("style").value;
    const rows = all.filter(
      (row) =>
        !hidden.has(columns.state[row]) &&
        (style === "" || `=${columns.style[row] ?? ""}` === style) &&
        (wanted === "" || ids[row].includes(wanted)),
    );
    const fewer = rows.length < all.length;
    byId("shown").textContent = fewer ? `${grouped.format(rows.length)} of ${grouped.format(all.length)}` : "";
    byId("none").hidden = rows.length > 0;
    grid.show(rows);
  }

  function count(values) {
    const counts = new Map();
    for (const value of values) counts.set(value, (counts.get(value) ?? 0) + 1);
    return counts;
  }

  const states = count(columns.state);
  for (const state of Object.keys(STATES).filter((name) => states.has(name))) {
    const chip = element(
      "button",
      { type: "button", class: `chip ${state}`, "aria-pressed": "true" },
      STATES[state],
      " ",
      element("span", {}, grouped.format(states.get(state))),
    );
    chip.addEventListener("click", () => {
      if (!hidden.delete(state)) hidden.add(state);
      chip.setAttribute("aria-pressed", String(!hidden.has(state)));
      filter();
    });
    byId("states").append(chip);
  }
  byId("states").hidden = states.size < 2;

  const styles = count(columns.style.map((style) => style ?? ""));
  const choose = byId("style");
  choose.append(element("option", { value: "" }, "All styles"));
  for (const style of [...styles.keys()].sort()) {
    const label = `${style || "no style"} (${grouped.format(styles.get(style))})`;
    choose.append(element("option", { value: `=${style}` }, label));
  }
  choose.hidden = styles.size < 2;
  choose.addEventListener("change", filter);

  byId("search").addEventListener("input", filter);
  byId("search").addEventListener("keydown", (event) => {
    if (event.key === "ArrowDown" || event.key === "Enter") {
      event.preventDefault();
      grid.focus(0);
    }
  });
  byId("all").addEventListener("click", () => {
    hidden.clear();
    for (const chip of byId("states").children) chip.setAttribute("aria-pressed", "true");
    choose.value = "";
    byId("search").value = "";
    filter();
  });
  document.addEventListener("keydown", (event) => {
    const typing = event.target.matches("input:not([type=checkbox]), select, textarea");
    if (event.key === "/" && !typing && !byId("viewer").open) {
      event.preventDefault();
      byId("search").focus();
    }
  });
  filter();
})();
