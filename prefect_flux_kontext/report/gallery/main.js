// Search and filters. Loaded last: it shows the first rows.

const main = (() => {
  // Rows in progress have no image yet.
  const hidden = new Set(data.live ? ["outstanding"] : []);
  const CHOICES = {
    style: { all: "All styles", none: "no style", values: (row) => [columns.style[row] ?? ""] },
    verdict: {
      all: "All verdicts",
      none: "no verdict",
      values: (row) => (columns.state[row] === "stored" ? [verdicts.LABELS[columns.verdict[row]] ?? ""] : []),
    },
    flag: {
      all: "With or without flag",
      none: "no flag",
      values: (row) => (columns.state[row] === "stored" ? (columns.check_flags[row] ?? [""]) : []),
    },
  };

  function filter(changed) {
    const wanted = byId("search").value.trim().toLowerCase();
    const chosen = Object.entries(CHOICES).filter(([name]) => byId(name).value);
    const all = columns.id;
    const rows = all.map((_, row) => row).filter(
      (row) =>
        !hidden.has(columns.state[row]) &&
        chosen.every(([name, { values }]) => values(row).some((value) => `=${value}` === byId(name).value)) &&
        (wanted === "" || columns.id[row].toLowerCase().includes(wanted)),
    );
    const fewer = rows.length < all.length;
    byId("shown").textContent = fewer ? `${grouped.format(rows.length)} of ${grouped.format(all.length)}` : "";
    byId("none").hidden = rows.length > 0;
    grid.show(rows, changed);
  }

  function count(values) {
    const counts = new Map();
    for (const value of values) counts.set(value, (counts.get(value) ?? 0) + 1);
    return counts;
  }

  function makeChip(state, number) {
    const chip = element(
      "button",
      { type: "button", class: `chip ${state}`, "aria-pressed": String(!hidden.has(state)) },
      STATES[state],
      " ",
      element("span", {}, grouped.format(number)),
    );
    chip.addEventListener("click", () => {
      if (!hidden.delete(state)) hidden.add(state);
      chip.setAttribute("aria-pressed", String(!hidden.has(state)));
      filter();
    });
    return chip;
  }

  function makeChoice(name, { all, none, values }) {
    const choose = byId(name);
    const { value } = choose;
    const counts = count(columns.id.flatMap((_, row) => values(row)));
    const options = [...counts.keys()].sort().map((each) =>
      element("option", { value: `=${each}` }, `${each || none} (${grouped.format(counts.get(each))})`),
    );
    choose.replaceChildren(element("option", { value: "" }, all), ...options);
    choose.hidden = counts.size < 2 && !value;
    choose.value = value;
    if (choose.selectedIndex < 0) choose.value = "";
  }

  // Shows the rows that the filters let through; `changed` rows are drawn again.
  function refresh(changed) {
    const states = count(columns.state);
    const named = Object.keys(STATES).filter((name) => states.has(name));
    byId("states").replaceChildren(...named.map((state) => makeChip(state, states.get(state))));
    byId("states").hidden = states.size < 2 && !hidden.has(named[0]);
    for (const [name, choice] of Object.entries(CHOICES)) makeChoice(name, choice);
    filter(changed);
  }

  for (const name of Object.keys(CHOICES)) byId(name).addEventListener("change", () => filter());
  byId("search").addEventListener("input", () => filter());
  byId("search").addEventListener("keydown", (event) => {
    if (event.key === "ArrowDown" || event.key === "Enter") {
      event.preventDefault();
      grid.focus(0);
    }
  });
  byId("all").addEventListener("click", () => {
    hidden.clear();
    for (const chip of byId("states").children) chip.setAttribute("aria-pressed", "true");
    for (const name of Object.keys(CHOICES)) byId(name).value = "";
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
  refresh();

  return { refresh };
})();
