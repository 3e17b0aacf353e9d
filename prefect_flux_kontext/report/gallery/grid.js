// The grid: only the cards on the screen exist, however many rows there are.

const grid = (() => {
  const GAP = 14;
  const CAPTION = 46;
  const SPARE_LINES = 2;
  const box = byId("grid");
  const cards = new Map();
  let shown = [];
  let across = 1;
  let wide = 0;
  let current = 0;
  let asked = false;

  function measure() {
    const room = box.clientWidth;
    const least = room < 560 ? 150 : 224;
    across = Math.max(1, Math.floor((room + GAP) / (least + GAP)));
    wide = (room - GAP * (across - 1)) / across;
  }

  const high = () => wide * 0.75 + CAPTION;
  const pitch = () => high() + GAP;

  function range() {
    const top = -box.getBoundingClientRect().top;
    const first = Math.floor(top / pitch()) - SPARE_LINES;
    const last = Math.ceil((top + window.innerHeight) / pitch()) + SPARE_LINES;
    return [Math.max(0, first * across), Math.min(shown.length, last * across)];
  }

  function place(card, at) {
    card.style.width = `${wide}px`;
    card.style.height = `${high()}px`;
    const left = (at % across) * (wide + GAP);
    card.style.transform = `translate(${left}px, ${Math.floor(at / across) * pitch()}px)`;
    card.setAttribute("aria-posinset", at + 1);
    card.setAttribute("aria-setsize", shown.length);
  }

  function face(row) {
    const state = cell("state", row);
    if (state === "stored") {
      const picture = element("img", { alt: "", decoding: "async", draggable: "false" });
      album.show(pictureOf.after[row], (url) => {
        if (url) picture.src = url;
        else picture.replaceWith(element("span", { class: "blank" }, "no thumbnail"));
      });
      return picture;
    }
    return element(
      "span",
      { class: "why" },
      element("b", {}, cell("reason", row) ?? STATES[state] ?? state),
      element("span", {}, (cell("message", row) ?? "").replace(/^Task \S+ failed: [^:]*: /, "")),
    );
  }

  function make(at) {
    const row = shown[at];
    const id = cell("id", row);
    const state = cell("state", row);
    const style = cell("style", row);
    const told = [id, style, STATES[state] ?? state, state === "failed" && cell("reason", row)];
    const open = element(
      "button",
      {
        type: "button",
        class: "open",
        tabindex: at === current ? "0" : "-1",
        "aria-label": told.filter(Boolean).join(", "),
      },
      face(row),
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
    asked = false;
    const [first, last] = range();
    const held = document.activeElement;
    for (const [at, card] of cards) {
      if ((at < first || at >= last) && !card.contains(held)) {
        card.remove();
        cards.delete(at);
      }
    }
    for (let at = first; at < last; at += 1) {
      if (!cards.has(at)) {
        cards.set(at, make(at));
        box.append(cards.get(at));
      }
    }
  }

  function later() {
    if (!asked) {
      asked = true;
      requestAnimationFrame(draw);
    }
  }

  function lay() {
    measure();
    box.style.height = `${Math.max(0, Math.ceil(shown.length / across) * pitch() - GAP)}px`;
    for (const [at, card] of cards) place(card, at);
    draw();
  }

  function focus(at) {
    if (!shown.length) return;
    cards.get(current)?.querySelector(".open").setAttribute("tabindex", "-1");
    current = Math.min(Math.max(at, 0), shown.length - 1);
    const line = Math.floor(current / across) * pitch();
    const top = box.getBoundingClientRect().top + line;
    const tools = byId("tools").offsetHeight + GAP;
    const bottom = window.innerHeight - byId("redo").offsetHeight - GAP;
    if (top < tools) window.scrollBy(0, top - tools);
    else if (top + high() > bottom) window.scrollBy(0, top + high() - bottom);
    draw();
    const open = cards.get(current).querySelector(".open");
    open.setAttribute("tabindex", "0");
    open.focus({ preventScroll: true });
  }

  const MOVES = {
    ArrowLeft: () => -1,
    ArrowRight: () => 1,
    ArrowUp: () => -across,
    ArrowDown: () => across,
    PageUp: () => -across * 4,
    PageDown: () => across * 4,
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
    // Down from above the last line goes there, not past the end; up from the first stays.
    if (current + by >= 0 || by === -current) focus(current + by);
  });
  window.addEventListener("scroll", later, { passive: true });
  new ResizeObserver(() => box.clientWidth && lay()).observe(box);

  return {
    show(rows) {
      shown = rows;
      current = 0;
      for (const card of cards.values()) card.remove();
      cards.clear();
      lay();
    },
    row: (at) => shown[at],
    length: () => shown.length,
    focus,
    refresh() {
      for (const [at, card] of cards) card.querySelector(".pick input").checked = redo.has(shown[at]);
    },
  };
})();
