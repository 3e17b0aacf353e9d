// The grid. Only the cards on the screen exist, so that many rows cost no more than few.

const grid = (() => {
  // Pixels, as in style.css.
  const GAP = 14;
  const CAPTION_HEIGHT = 46;
  // Lines above and below the screen that exist too, so that scrolling shows no gaps.
  const SPARE_LINES = 2;
  const box = byId("grid");
  const cards = new Map();
  let shown = [];
  let cardsPerLine = 1;
  let cardWidth = 0;
  let current = 0;
  let isDrawRequested = false;

  function measure() {
    const width = box.clientWidth;
    const minimum = width < 560 ? 150 : 224;
    cardsPerLine = Math.max(1, Math.floor((width + GAP) / (minimum + GAP)));
    cardWidth = (width - GAP * (cardsPerLine - 1)) / cardsPerLine;
  }

  const cardHeight = () => cardWidth * 0.75 + CAPTION_HEIGHT;
  const lineHeight = () => cardHeight() + GAP;

  function visibleRange() {
    const top = -box.getBoundingClientRect().top;
    const first = Math.floor(top / lineHeight()) - SPARE_LINES;
    const last = Math.ceil((top + window.innerHeight) / lineHeight()) + SPARE_LINES;
    return [Math.max(0, first * cardsPerLine), Math.min(shown.length, last * cardsPerLine)];
  }

  function place(card, at) {
    card.style.width = `${cardWidth}px`;
    card.style.height = `${cardHeight()}px`;
    const left = (at % cardsPerLine) * (cardWidth + GAP);
    card.style.transform = `translate(${left}px, ${Math.floor(at / cardsPerLine) * lineHeight()}px)`;
    card.setAttribute("aria-posinset", at + 1);
    card.setAttribute("aria-setsize", shown.length);
  }

  function cardContent(row) {
    const state = cell("state", row);
    if (state === "stored") {
      const image = element("img", { alt: "", decoding: "async", draggable: "false" });
      thumbnails.show(thumbnailOf.after[row], (url) => {
        if (url) image.src = url;
        else image.replaceWith(element("span", { class: "blank" }, "no thumbnail"));
      });
      return image;
    }
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
    const label = [id, style, STATES[state] ?? state, state === "failed" && cell("reason", row)];
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
        element("span", { class: "style" }, style ?? (state === "stored" ? "" : STATES[state] ?? state)),
      ),
    );
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
    const [first, last] = visibleRange();
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
  }

  function requestDraw() {
    if (!isDrawRequested) {
      isDrawRequested = true;
      requestAnimationFrame(draw);
    }
  }

  function layOut() {
    measure();
    box.style.height = `${Math.max(0, Math.ceil(shown.length / cardsPerLine) * lineHeight() - GAP)}px`;
    for (const [at, card] of cards) place(card, at);
    draw();
  }

  function focus(at) {
    if (!shown.length) return;
    cards.get(current)?.querySelector(".open").setAttribute("tabindex", "-1");
    current = Math.min(Math.max(at, 0), shown.length - 1);
    const line = Math.floor(current / cardsPerLine) * lineHeight();
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
    ArrowUp: () => -cardsPerLine,
    ArrowDown: () => cardsPerLine,
    PageUp: () => -cardsPerLine * 4,
    PageDown: () => cardsPerLine * 4,
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
    const by = MOVES[event.key]?.();
    if (by === undefined) return;
    event.preventDefault();
    // Down from the last line but one goes to the last card at most; up from the first line stays.
    if (current + by >= 0 || by === -current) focus(current + by);
  });
  window.addEventListener("scroll", requestDraw, { passive: true });
  new ResizeObserver(() => box.clientWidth && layOut()).observe(box);

  return {
    show(rows) {
      shown = rows;
      current = 0;
      for (const card of cards.values()) card.remove();
      cards.clear();
      layOut();
    },
    row: (at) => shown[at],
    length: () => shown.length,
    focus,
    refresh() {
      for (const [at, card] of cards) card.querySelector(".pick input").checked = redo.has(shown[at]);
    },
  };
})();
