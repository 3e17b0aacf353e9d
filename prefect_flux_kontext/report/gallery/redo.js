// The selected rows, as a manifest to download.

const redo = (() => {
  const chosen = new Set();
  const PARAMETERS = ["mode", "aspect_ratio", "output_format", "provider"];

  function values(row, prompt) {
    const style = cell("style", row);
    const references = cell("reference_images", row) ?? [];
    const customCells = Object.entries(custom)
      .filter(([name]) => !["image", "images"].includes(name))
      .map(([name, column]) => [name, column[row]]);
    return Object.fromEntries([
      ...customCells,
      // Rows of one id in several styles get ids of their own: their prompts hold the style already.
      ["id", style ? `${cell("id", row)}-${style}` : cell("id", row)],
      ["images", references.length ? JSON.stringify(references) : ""],
      ["prompt", prompt || cell("prompt", row)],
      ...PARAMETERS.map((name) => [name, cell(name, row)]),
    ]);
  }

  const quote = (text) => `"${String(text ?? "").replaceAll('"', '""')}"`;

  function buildManifest() {
    const prompt = byId("prompt").value.trim();
    const rows = [...chosen].sort((one, other) => one - other).map((row) => values(row, prompt));
    const names = Object.keys(rows[0]);
    const lines = [names, ...rows.map((row) => names.map((name) => row[name]))];
    return lines.map((line) => `${line.map(quote).join(",")}\r\n`).join("");
  }

  function update() {
    byId("redo").hidden = chosen.size === 0;
    byId("chosen").textContent = `${grouped.format(chosen.size)} selected`;
    grid.refresh();
  }

  byId("download").addEventListener("click", () => {
    const url = URL.createObjectURL(new Blob([buildManifest()], { type: "text/csv" }));
    element("a", { href: url, download: "redo.csv" }).click();
    setTimeout(() => URL.revokeObjectURL(url), 10_000);
  });
  byId("clear").addEventListener("click", () => {
    chosen.clear();
    byId("prompt").value = "";
    update();
  });

  if (data.live) {
    for (const id of ["other", "ask", "keep-all", "reject-all", "redo-live"]) byId(id).hidden = false;
    for (const id of ["download", "redo-file"]) byId(id).hidden = true;
    const options = data.live.styles.map((style) => element("option", { value: style }, style));
    byId("new-style").append(element("option", { value: "" }, "of each row"), ...options);
  }
  const judge = async (verdict, changes) => {
    if (await verdicts.set([...chosen], verdict, changes)) byId("clear").click();
  };
  byId("ask").addEventListener("click", () =>
    judge("redo", { prompt: byId("prompt").value.trim(), style: byId("new-style").value }),
  );
  byId("keep-all").addEventListener("click", () => judge("keep"));
  byId("reject-all").addEventListener("click", () => judge("reject"));

  return {
    has: (row) => chosen.has(row),
    set(row, isSelected) {
      if (isSelected) chosen.add(row);
      else chosen.delete(row);
      update();
    },
  };
})();
