// Thumbnails: loaded one file at a time, on demand. The least recently used files are dropped.

const thumbnails = (() => {
  // About 20 MB of thumbnails.
  const MAX_FILES = 30;
  const files = new Map();
  const pending = new Map();

  function resolve(file) {
    const requests = pending.get(file) ?? [];
    pending.delete(file);
    for (const [name, show] of requests) show(files.get(file)?.[name] ?? null);
  }

  function load(file) {
    const script = element("script", { src: `${data.folder}/${encodeURIComponent(file)}.js` });
    script.onload = script.onerror = () => {
      script.remove();
      resolve(file);
    };
    document.head.append(script);
  }

  return {
    // Calls show(url), now or later; with null if there is no such thumbnail.
    show(name, show) {
      const file = data.thumbnailFiles[name];
      if (name === null || data.embedded[name] || file === undefined) {
        // The server makes the thumbnail of an image whose wave has not ended.
        const isAfter = data.live && name !== null && !name.startsWith("r");
        show(isAfter ? `thumbnails/${name}` : (data.embedded[name] ?? null));
        return;
      }
      if (files.has(file)) {
        const urls = files.get(file);
        files.delete(file); // a Map keeps its order, so this moves the file to the end
        files.set(file, urls);
        show(urls[name] ?? null);
        return;
      }
      if (!pending.has(file)) {
        pending.set(file, []);
        load(file);
      }
      pending.get(file).push([name, show]);
    },

    has: (name) => name !== null && (name in data.embedded || name in data.thumbnailFiles),

    keep(file, urls) {
      files.set(file, urls);
      if (files.size > MAX_FILES) files.delete(files.keys().next().value);
    },
  };
})();

// The thumbnail files call this.
function galleryPart(file, urls) {
  thumbnails.keep(file, urls);
}
