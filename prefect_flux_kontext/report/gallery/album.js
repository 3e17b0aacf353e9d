// Pictures, loaded a file at a time when they are wanted, and let go when many others were since.

const album = (() => {
  const MOST_FILES = 30;
  const files = new Map();
  const waiting = new Map();

  function answer(file) {
    const asked = waiting.get(file) ?? [];
    waiting.delete(file);
    for (const [name, show] of asked) show(files.get(file)?.[name] ?? null);
  }

  function load(file) {
    const script = element("script", { src: `${data.folder}/${encodeURIComponent(file)}.js` });
    script.onload = script.onerror = () => {
      script.remove();
      answer(file);
    };
    document.head.append(script);
  }

  return {
    // Calls show(url) now or later; with null where there is no such picture.
    show(name, show) {
      const file = data.places[name];
      if (name === null || data.pictures[name] || file === undefined) {
        show(data.pictures[name] ?? null);
        return;
      }
      if (files.has(file)) {
        const pictures = files.get(file);
        files.delete(file); // to its place among the latest
        files.set(file, pictures);
        show(pictures[name] ?? null);
        return;
      }
      if (!waiting.has(file)) {
        waiting.set(file, []);
        load(file);
      }
      waiting.get(file).push([name, show]);
    },

    has: (name) => name !== null && (name in data.pictures || name in data.places),

    keep(file, pictures) {
      files.set(file, pictures);
      if (files.size > MOST_FILES) files.delete(files.keys().next().value);
    },
  };
})();

// What the files of pictures call.
function galleryPart(file, pictures) {
  album.keep(file, pictures);
}
