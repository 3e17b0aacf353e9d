// The view of one row, with a slider between before and after.

const viewer = (() => {
  const dialog = byId("viewer");
  const figure = byId("figure");
  const slider = byId("slider");
  let at = 0;

  const encodePath = (file) => file.split("/").map(encodeURIComponent).join("/");

  function addFact(name, value) {
    if (value === null || value === "") return;
    byId("facts").append(element("dt", {}, name), element("dd", {}, value));
  }

  function link(url) {
    if (!/^https?:\/\//i.test(url)) return url;
    return element("a", { href: url, target: "_blank", rel: "noopener noreferrer" }, url);
  }

  function showFacts(row) {
    byId("facts").replaceChildren();
    const seconds = (name) => {
      const value = cell(`${name}_seconds`, row);
      return value === null ? null : duration(value);
    };
    const [width, height, bytes] = ["width", "height", "bytes"].map((name) => cell(name, row));
    const size = bytes > 1e6 ? `${rounded.format(bytes / 1e6)} MB` : `${rounded.format((bytes ?? 0) / 1e3)} kB`;
    const file = cell("file", row);
    addFact("Prompt", cell("prompt", row));
    addFact("Style", cell("style", row));
    if (cell("variant_number", row) > 1) addFact("Variant", String(cell("variant_number", row)));
    addFact("Flags", (cell("check_flags", row) ?? []).join(", "));
    addFact("Verdict", verdicts.LABELS[cell("verdict", row)] ?? null);
    if (file) addFact("Image", element("a", { href: encodePath(file), target: "_blank" }, file));
    if (width) addFact("Size", `${width} × ${height} px, ${size}`);
    for (const url of cell("reference_images", row) ?? []) addFact("Reference", link(url));
    addFact("Parameters", ["mode", "aspect_ratio", "output_format", "provider"]
      .map((name) => cell(name, row)).filter(Boolean).join(", "));
    addFact("Waiting time", seconds("waiting"));
    addFact("Generation time", seconds("generation"));
    addFact("Download time", seconds("download"));
    const cost = cell("cost_usd", row);
    const attempts = cell("attempts", row);
    if (cost !== null) addFact("Cost", dollars(cost) + (attempts > 1 ? ` for ${attempts} attempts` : ""));
    addFact("Task", cell("task_id", row));
    addFact("Line", String(cell("line", row)));
    for (const [name, values] of Object.entries(custom)) {
      if (!["image", "images"].includes(name)) addFact(name, values[row] ?? null);
    }
  }

  function split(percent) {
    slider.value = percent;
    figure.style.setProperty("--split", `${percent}%`);
  }

  function showThumbnail(image, row, which) {
    image.removeAttribute("src");
    image.hidden = true;
    thumbnails.show(thumbnailOf[which][row], (url) => {
      if (grid.row(at) !== row || !url) return;
      if (!image.hidden) return; // the image itself has loaded first
      image.src = url;
      image.hidden = false;
    });
  }

  function showImages(row) {
    const stored = cell("state", row) === "stored";
    const [width, height] = [cell("width", row), cell("height", row)];
    figure.style.setProperty("--ratio", width ? width / height : 4 / 3);
    const both = stored && thumbnails.has(thumbnailOf.before[row]);
    figure.classList.toggle("both", both);
    figure.classList.toggle("only-before", !stored && thumbnails.has(thumbnailOf.before[row]));
    slider.hidden = !both;
    showThumbnail(byId("after"), row, "after");
    showThumbnail(byId("before"), row, "before");
    byId("after").alt = stored ? `${cell("id", row)}, after` : "";
    byId("before").alt = both ? `${cell("id", row)}, before` : "";
    byId("missing").textContent = stored || thumbnails.has(thumbnailOf.before[row]) ? "" : "No image";
    if (stored && cell("file", row)) showFullImage(row);
  }

  // Replaces the thumbnail by the image itself once that has loaded.
  function showFullImage(row) {
    const image = new Image();
    image.src = encodePath(cell("file", row));
    image.decode().then(() => {
      if (dialog.open && grid.row(at) === row) {
        byId("after").src = image.src;
        byId("after").hidden = false;
      }
    }, () => {});
  }

  function show(position) {
    if (position < 0 || position >= grid.length()) return;
    at = position;
    const row = grid.row(at);
    const state = cell("state", row);
    byId("viewed").textContent = cell("id", row);
    byId("place").textContent = `${grouped.format(at + 1)} of ${grouped.format(grid.length())}`;
    byId("pick").checked = redo.has(row);
    byId("judge").hidden = !data.live || state !== "stored";
    for (const button of byId("judge").children) {
      button.setAttribute("aria-pressed", String(button.dataset.verdict === cell("verdict", row)));
      if (button.dataset.verdict === "best") button.hidden = !verdicts.isVariant(row);
    }
    byId("previous").disabled = at === 0;
    byId("next").disabled = at === grid.length() - 1;
    const why = byId("why");
    why.hidden = state === "stored";
    why.className = state;
    why.replaceChildren(
      element("b", {}, [STATES[state] ?? state, cell("reason", row)].filter(Boolean).join(": ")),
      " ",
      cell("message", row) ?? "",
    );
    showImages(row);
    showFacts(row);
    split(50);
  }

  function moveSlider(event) {
    const side = figure.getBoundingClientRect();
    split(Math.min(100, Math.max(0, ((event.clientX - side.left) / side.width) * 100)));
  }

  slider.addEventListener("input", () => split(slider.value));
  figure.addEventListener("pointerdown", (event) => {
    if (!figure.classList.contains("both") || event.button) return;
    event.preventDefault();
    figure.setPointerCapture(event.pointerId);
    slider.focus({ preventScroll: true });
    moveSlider(event);
  });
  figure.addEventListener("pointermove", (event) => {
    if (figure.hasPointerCapture(event.pointerId)) moveSlider(event);
  });
  byId("previous").addEventListener("click", () => show(at - 1));
  byId("next").addEventListener("click", () => show(at + 1));
  byId("close").addEventListener("click", () => dialog.close());
  byId("pick").addEventListener("change", () => redo.set(grid.row(at), byId("pick").checked));
  // The same verdict again withdraws it; after any other, the next image follows.
  async function judge(verdict) {
    const row = grid.row(at);
    const isSame = cell("verdict", row) === verdict;
    const position = at;
    const isSet = await verdicts.set([row], isSame ? null : verdict);
    if (isSet && verdict && !isSame && grid.row(position) === row) show(position + 1);
  }
  for (const button of byId("judge").children) {
    button.addEventListener("click", () => judge(button.dataset.verdict));
  }
  dialog.addEventListener("click", (event) => {
    if (event.target === dialog) dialog.close();
  });
  dialog.addEventListener("close", () => grid.focus(at));
  dialog.addEventListener("keydown", (event) => {
    if (event.target === slider && event.key.startsWith("Arrow")) return;
    const verdict = verdicts.ofKey(event);
    if (verdict !== undefined && cell("state", grid.row(at)) === "stored") judge(verdict);
    if (event.key === "ArrowLeft") show(at - 1);
    else if (event.key === "ArrowRight") show(at + 1);
    else return;
    event.preventDefault();
  });

  return {
    refresh(changed) {
      if (dialog.open && changed.has(grid.row(at))) show(at);
    },
    open(position) {
      show(position);
      dialog.showModal();
      byId("close").focus();
    },
  };
})();
