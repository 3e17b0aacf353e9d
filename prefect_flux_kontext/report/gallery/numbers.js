// The statistics of the batch: numbers and histograms.

function showNumbers() {
  const { states, costUsd, seconds, imagesPerSecond, recordedAt, times } = data.statistics;
  byId("numbers").replaceChildren();
  byId("histograms").replaceChildren();
  const all = Object.values(states).reduce((sum, number) => sum + number, 0);

  byId("title").textContent = data.title;
  document.title = `${data.title}: gallery`;
  const facts = [`${grouped.format(all)} ${all === 1 ? "row" : "rows"}`];
  if (data.rows < all) facts.push(`the first ${grouped.format(data.rows)} are shown`);
  if (recordedAt) {
    const at = new Date(recordedAt);
    facts.push(at.toLocaleString("en-GB", { dateStyle: "long", timeStyle: "short" }));
  }
  byId("recorded").textContent = facts.join(" · ");

  const number = (value, name, kind = "") =>
    byId("numbers").append(
      element("div", { class: kind }, element("dt", {}, name), element("dd", {}, value)),
    );
  number(grouped.format(states.stored ?? 0), "images");
  for (const state of ["failed", "unknown", "outstanding", "not_submitted"]) {
    if (states[state]) number(grouped.format(states[state]), STATES[state], state);
  }
  number(dollars(costUsd), "total cost");
  if (imagesPerSecond) {
    number(rounded.format(imagesPerSecond), "images a second");
    number(duration(seconds), "last run");
  }

  const SVG = "http://www.w3.org/2000/svg";
  const WIDTH = 480;
  const HEIGHT = 64;

  function shape(tag, attributes) {
    const made = document.createElementNS(SVG, tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    return made;
  }

  function histogram(name, { start, width, bars, median, p95 }) {
    const highest = Math.max(...bars);
    const step = WIDTH / bars.length;
    const end = start + width * bars.length;
    const summary = `median ${duration(median)}, 95th percentile ${duration(p95)}`;
    const chart = shape("svg", {
      viewBox: `0 0 ${WIDTH} ${HEIGHT}`,
      preserveAspectRatio: "none",
      role: "img",
      "aria-label": `${name}: ${summary}`,
    });
    bars.forEach((count, position) => {
      const height = count && Math.max(2, (count / highest) * HEIGHT);
      const bar = shape("rect", {
        x: position * step + step * 0.06,
        y: HEIGHT - height,
        width: step * 0.88,
        height,
        rx: 1.5,
      });
      const title = shape("title", {});
      const from = start + position * width;
      title.textContent = `${rounded.format(from)} to ${rounded.format(from + width)} s: ${grouped.format(count)}`;
      bar.append(title);
      chart.append(bar);
    });
    byId("histograms").append(
      element(
        "figure",
        {},
        element("figcaption", {}, element("b", {}, name), element("span", {}, summary)),
        chart,
        element(
          "div",
          { class: "axis", "aria-hidden": "true" },
          element("span", {}, duration(start)),
          element("span", {}, duration(end)),
        ),
      ),
    );
  }

  // The cost of the rows on the page by the values of a column; equal rows are paid for once.
  const SPEND_ROWS = 20;
  const byColumn = {};
  for (const name of ["style", "mode", "aspect_ratio", "provider"]) byColumn[name] = columns[name];
  Object.assign(byColumn, custom);

  function showSpend() {
    const values = byColumn[byId("spend-by").value];
    const paid = new Set();
    const costs = new Map();
    columns.cost_usd.forEach((cost, row) => {
      if (!cost || paid.has(columns.task_id[row])) return;
      if (columns.task_id[row]) paid.add(columns.task_id[row]);
      const value = values[row] || "other";
      const [rows, sum] = costs.get(value) ?? [0, 0];
      costs.set(value, [rows + 1, sum + cost]);
    });
    const sorted = [...costs].sort((one, other) => other[1][1] - one[1][1]);
    const rest = sorted.splice(SPEND_ROWS);
    if (rest.length) {
      const sums = rest.reduce(([rows, sum], [, [more, cost]]) => [rows + more, sum + cost], [0, 0]);
      sorted.push([`… ${grouped.format(rest.length)} more`, sums]);
    }
    byId("spend-rows").replaceChildren(
      ...sorted.map(([value, [rows, sum]]) =>
        element(
          "tr",
          {},
          element("th", { scope: "row" }, value),
          element("td", {}, `${grouped.format(rows)} ${rows === 1 ? "row" : "rows"}`),
          element("td", {}, dollars(sum)),
        ),
      ),
    );
  }

  for (const name of Object.keys(byColumn)) {
    byId("spend-by").append(element("option", { value: name }, name));
  }
  byId("spend-by").addEventListener("change", showSpend);
  byId("spend").hidden = !costUsd;
  showSpend();

  if (times.generation) histogram("Generation time, as measured by the service", times.generation);
  if (times.waiting) histogram("Waiting time, from submit to result", times.waiting);
}

showNumbers();
