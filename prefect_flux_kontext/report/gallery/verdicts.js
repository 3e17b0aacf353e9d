// Verdicts: kept, rejected or to be redone. A page that is served can set them.

const verdicts = (() => {
  const LABELS = { keep: "kept", reject: "rejected", redo: "to redo" };
  const KEYS = { k: "keep", x: "reject", r: "redo", b: "best", u: null };

  const isVariant = (row) => columns.variant_number.some(
    (number, other) =>
      other !== row &&
      columns.id[other] === columns.id[row] &&
      columns.style[other] === columns.style[row] &&
      columns.state[other] === "stored",
  );

  async function set(rows, verdict, changes = {}) {
    const names = rows.filter((row) => cell("state", row) === "stored").map((row) => thumbnailOf.after[row]);
    if (!data.live || !names.length) return false;
    try {
      const reply = await fetch("verdicts", {
        method: "POST",
        headers: { "Content-Type": "application/json" },
        body: JSON.stringify({ names, verdict, since: live.version(), ...changes }),
      });
      const answer = await reply.json();
      if (!reply.ok) throw new Error(answer.error);
      live.apply(answer);
    } catch (error) {
      live.report(error.message);
      return false;
    }
    return true;
  }

  return {
    LABELS,
    isVariant,
    set,
    // The verdict of a key; undefined if the key is for something else.
    ofKey: (event) =>
      data.live && !event.ctrlKey && !event.metaKey && !event.altKey && !event.target.matches("input[type=text], select")
        ? KEYS[event.key]
        : undefined,
  };
})();
