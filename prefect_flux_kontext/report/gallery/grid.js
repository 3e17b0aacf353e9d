// The grid. Only the cards on the screen exist, so that many rows cost no more than few.
//
// If the rows are all references in all of several styles, the grid is a matrix: a line for each
// reference, which comes first, and a column for each style.

const grid = (() => {
  // Pixels, as in style.css.
  const GAP = 14;
  const CAPTION_HEIGHT = 46;
  // Lines above and below the screen that exist too, so that scrolling shows no gaps.
  const SPARE_LINES = 2;
  const box = byId("grid");
  const MIN_MATRIX_CARD_WIDTH = 110;
  const cards = new Map();
  const references = new Map(); // by line, in a matrix
  let shown = [];
  let stylesOfMatrix = 0; // 0: no matrix
  let isMatrix = false;
  let columnsBefore = 0; // 1: a matrix with a column of references
  let cardsPerLine = 1;
  let rowsPerLine = 1;
  let cardWidth = 0;
  let current = 0;
  let isDrawRequested = false;

  function measure() {
    const width = box.clientWidth;
    const minimum = width < 560 ? 150 : 224;
    const fits = (stylesOfMatrix + 1) * (MIN_MATRIX_CARD_WIDTH + GAP) <= width + GAP;
    isMatrix = stylesOfMatrix > 1 && fits;
    rowsPerLine = Math.max(1, Math.floor((width + GAP) / (minimum + GAP)));
    if (isMatrix) rowsPerLine = stylesOfMatrix;
    columnsBefore = isMatrix && shown.some((row) => thumbnailOf.before[row]) ? 1 : 0;
    cardsPerLine = rowsPerLine + columnsBefore;
    cardWidth = (width - GAP * (cardsPerLine - 1)) / cardsPerLine;
  }

  const cardHeight = () => cardWidth * 0.75 + CAPTION_HEIGHT;
  const lineHeight = () => cardHeight() + GAP;

  const lineOf = (row) => thumbnailOf.before[row] ?? `of ${cell("id", row)}`;
  const columnOf = (row) => `${cell("style", row) ?? ""} ${String(cell("variant_number", row) ?? 1).padStart(3, "0")}`;

  // Returns the rows in the order of a matrix and its number of styles, or null if they are none.
  function arrange(rows) {
    const names = [...new Set(rows.map(lineOf))];
    const styles = [...new Set(rows.map(columnOf))].sort();
    if (styles.length < 2 || names.length * styles.length !== rows.length) return null;
    const line = new Map(names.map((name, at) => [name, at]));
    const column = new Map(styles.map((style, at) => [style, at]));
    const sorted = new Array(rows.length);
    for (const row of rows) {
      const place = line.get(lineOf(row)) * styles.length + column.get(columnOf(row));
      if (sorted[place] !== undefined) return null; // twice the same style of one reference
      sorted[place] = row;
    }
    return { rows: sorted, styles: styles.length };
  }

  function visibleLines() {
    const top = -box.getBoundingClientRect().top;
    const first = Math.floor(top / lineHeight()) - SPARE_LINES;
    const last = Math.ceil((top + window.innerHeight) / lineHeight()) + SPARE_LINES;
    return [Math.max(0, first), Math.min(Math.ceil(shown.length / rowsPerLine), last)];
  }

  function move(card, line, column) {
    card.style.width = `${cardWidth}px`;
    card.style.height = `${cardHeight()}px`;
    card.style.transform = `translate(${column * (cardWidth + GAP)}px, ${line * lineHeight()}px)`;
  }

  function place(card, at) {
    move(card, Math.floor(at / rowsPerLine), (at % rowsPerLine) + columnsBefore);
    card.setAttribute("aria-posinset", at + 1);
    card.setAttribute("aria-setsize", shown.length);
  }

  function makeImage(name, alt) {
    const image = element("img", { alt, decoding: "async", draggable: "false" });
    thumbnails.show(name, (url) => {
      image.onerror = () => image.replaceWith(element("span", { class: "blank" }, "no thumbnail"));
      if (url) image.src = url;
      else image.replaceWith(element("span", { class: "blank" }, "no thumbnail"));
    });
    return image;
  }

  function makeReference(line) {
    const row = shown[line * rowsPerLine];
    const id = cell("id", row);
    const card = element(
      "div",
      { class: "card reference", role: "presentation" },
      element("div", { class: "open" }, makeImage(thumbnailOf.before[row], `${id}, before`)),
      element("div", { class: "caption" }, element("span", {}, "before")),
    );
    move(card, line, 0);
    return card;
  }

  function cardContent(row) {
    const state = cell("state", row);
    if (state === "stored") return makeImage(thumbnailOf.after[row], "");
    return element(
      "span",
      { class: "why" },
      element("b", {}, cell("reason", row) ?? STATES[state] ?? state),
      element("span", {}, (cell("message", row) ?? "").replace(/^Task \S+ failed: [^:]*: /, "")),
    );
  }

  function makeCard(at) {
    const row = shown[at];
    const id = cell("id", row);
    const state = cell("state", row);
    const style = cell("style", row);
    const number = cell("variant_number", row);
    const flags = cell("check_flags", row) ?? [];
    const kind = [style, number > 1 && `variant ${number}`, ...flags.map((flag) => `⚑ ${flag}`)].filter(Boolean).join(", ");
    const verdict = verdicts.LABELS[cell("verdict", row)];
    const label = [id, kind, STATES[state] ?? state, state === "failed" && cell("reason", row), verdict];
    const open = element(
      "button",
      {
        type: "button",
        class: "open",
        tabindex: at === current ? "0" : "-1",
        "aria-label": label.filter(Boolean).join(", "),
      },
      cardContent(row),
    );
    const pick = element("input", {
      type: "checkbox",
      tabindex: "-1",
      "aria-label": `Select ${id} to be redone`,
    });
    pick.checked = redo.has(row);
    pick.addEventListener("change", () => redo.set(row, pick.checked));
    const card = element(
      "div",
      { class: `card ${state}`, role: "listitem" },
      open,
      element("label", { class: "pick" }, pick),
      element(
        "div",
        { class: "caption" },
        element("span", { class: "id", title: id }, id),
        element("span", { class: "style" }, kind || (state === "stored" ? "" : STATES[state] ?? state)),
      ),
    );
    if (verdict) card.append(element("span", { class: `mark ${cell("verdict", row)}`, "aria-hidden": "true" }, verdict));
    open.addEventListener("click", () => {
      focus(at);
      viewer.open(at);
    });
    open.addEventListener("focus", () => {
      current = at;
    });
    place(card, at);
    return card;
  }

  function draw() {
    isDrawRequested = false;
    const [firstLine, lastLine] = visibleLines();
    const [first, last] = [firstLine * rowsPerLine, Math.min(lastLine * rowsPerLine, shown.length)];
    const focused = document.activeElement;
    for (const [at, card] of cards) {
      if ((at < first || at >= last) && !card.contains(focused)) {
        card.remove();
        cards.delete(at);
      }
    }
    for (let at = first; at < last; at += 1) {
      if (!cards.has(at)) {
        cards.set(at, makeCard(at));
        box.append(cards.get(at));
      }
    }
    for (const [line, card] of references) {
      if (!columnsBefore || line < firstLine || line >= lastLine) {
        card.remove();
        references.delete(line);
      }
    }
    for (let line = firstLine; columnsBefore && line < lastLine; line += 1) {
      if (!references.has(line)) {
        references.set(line, makeReference(line));
        box.append(references.get(line));
      }
    }
  }

  function requestDraw() {
    if (!isDrawRequested) {
      isDrawRequested = true;
      requestAnimationFrame(draw);
    }
  }

  function layOut() {
    measure();
    box.style.height = `${Math.max(0, Math.ceil(shown.length / rowsPerLine) * lineHeight() - GAP)}px`;
    for (const [at, card] of cards) place(card, at);
    for (const [line, card] of references) move(card, line, 0);
    draw();
  }

  function focus(at) {
    if (!shown.length) return;
    cards.get(current)?.querySelector(".open").setAttribute("tabindex", "-1");
    current = Math.min(Math.max(at, 0), shown.length - 1);
    const line = Math.floor(current / rowsPerLine) * lineHeight();
    const top = box.getBoundingClientRect().top + line;
    const tools = byId("tools").offsetHeight + GAP;
    const bottom = window.innerHeight - byId("redo").offsetHeight - GAP;
    if (top < tools) window.scrollBy(0, top - tools);
    else if (top + cardHeight() > bottom) window.scrollBy(0, top + cardHeight() - bottom);
    draw();
    const open = cards.get(current).querySelector(".open");
    open.setAttribute("tabindex", "0");
    open.focus({ preventScroll: true });
  }

  const MOVES = {
    ArrowLeft: () => -1,
    ArrowRight: () => 1,
    ArrowUp: () => -rowsPerLine,
    ArrowDown: () => rowsPerLine,
    PageUp: () => -rowsPerLine * 4,
    PageDown: () => rowsPerLine * 4,
    Home: () => -current,
    End: () => shown.length - 1 - current,
  };

  box.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === " " && event.target.classList.contains("open")) {
      event.preventDefault();
      redo.set(shown[current], !redo.has(shown[current]));
      return;
    }
    const verdict = verdicts.ofKey(event);
    if (verdict !== undefined) {
      verdicts.set([shown[current]], verdict);
      return;
    }
    const by = MOVES[event.key]?.();
    if (by === undefined) return;
    event.preventDefault();
    // Down from the last line but one goes to the last card at most; up from the first line stays.
    if (current + by >= 0 || by === -current) focus(current + by);
  });
  window.addEventListener("scroll", requestDraw, { passive: true });
  new ResizeObserver(() => box.clientWidth && layOut()).observe(box);

  return {
    // With `changed` rows, what is the same stays, and so do the focus and the place.
    show(rows, changed) {
      const matrix = arrange(rows);
      const before = shown;
      const isFocused = box.contains(document.activeElement);
      shown = matrix?.rows ?? rows;
      stylesOfMatrix = matrix?.styles ?? 0;
      current = changed ? Math.max(0, Math.min(current, shown.length - 1)) : 0;
      for (const [at, card] of cards) {
        if (!changed || before[at] !== shown[at] || changed.has(shown[at])) {
          card.remove();
          cards.delete(at);
        }
      }
      for (const card of references.values()) card.remove();
      references.clear();
      layOut();
      if (changed && isFocused) cards.get(current)?.querySelector(".open").focus({ preventScroll: true });
    },
    row: (at) => shown[at],
    length: () => shown.length,
    focus,
    refresh() {
      for (const [at, card] of cards) card.querySelector(".pick input").checked = redo.has(shown[at]);
    },
  };
})();
