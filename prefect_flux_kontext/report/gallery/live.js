// A page that is served asks for changes every two seconds while it is seen.

const live = (() => {
  const INTERVAL_MILLISECONDS = 2000;
  let version = data.live?.version ?? 0;

  function report(problem) {
    byId("problem").textContent = problem;
    byId("problem").hidden = !problem;
  }

  function showProgress({ running, rows, done, rate, secondsLeft, leftOut }) {
    const parts = [running ? "Running" : "No run is in progress"];
    if (rows) parts.push(`${grouped.format(done)} of ${grouped.format(rows)} rows done`);
    if (running && rate) parts.push(`${rounded.format(rate)} images a second`);
    if (running && secondsLeft) parts.push(`about ${duration(Math.ceil(secondsLeft))} left`);
    if (leftOut) parts.push(`${grouped.format(leftOut)} further rows are not shown`);
    byId("progress").textContent = parts.join(" · ");
    byId("live").classList.toggle("running", running);
  }

  function apply(changes) {
    const { at, rows } = changes;
    version = Math.max(version, changes.version);
    const copy = (target, source) => at.forEach((row, index) => (target[row] = source[index] ?? null));
    for (const name of Object.keys(columns)) copy(columns[name], rows.columns[name]);
    for (const name of Object.keys(rows.custom)) copy((custom[name] ??= []), rows.custom[name]);
    for (const which of ["after", "before"]) copy(thumbnailOf[which], rows[which]);
    data.thumbnailFiles = changes.thumbnailFiles ?? data.thumbnailFiles;
    data.rows = columns.id.length;
    data.statistics = changes.statistics;
    showNumbers();
    showProgress(changes.progress);
    report("");
    if (!at.length) return;
    main.refresh(new Set(at));
    viewer.refresh(new Set(at));
  }

  async function poll() {
    if (!document.hidden) {
      try {
        const reply = await fetch(`changes?since=${version}`);
        const answer = await reply.json();
        if (!reply.ok) throw new Error(answer.error);
        apply(answer);
      } catch (error) {
        report(`This page is not up to date: ${error.message}`);
      }
    }
    setTimeout(poll, INTERVAL_MILLISECONDS);
  }

  if (data.live) {
    byId("live").hidden = false;
    showProgress(data.live.progress);
    setTimeout(poll, INTERVAL_MILLISECONDS);
  }

  return { apply, report, version: () => version };
})();
