"use strict";
// Asks every two seconds for what is new and shows it; a page opened late, or loaded again, shows the same.
// Nothing is painted while nobody looks, and the chart is drawn again only after it rested REST times as long as drawing took.
(() => {
  const COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"];
  const DASHES = ["solid", "dash", "dot", "dashdot"], SYMBOLS = ["circle", "square", "diamond", "triangle-up", "cross", "x"];
  const PARTS = { values: "#0072B2", mask: "#D55E00", dense: "#56B4E9", buffers: "#009E73", auxiliary: "#CC79A7", header: "#6b7280" };
  const root = document.getElementById("runs"), headline = document.getElementById("headline");
  const figure = document.getElementById("curves"), chart = document.getElementById("chart");
  const buttons = [...document.querySelectorAll("[data-x]")];
  const cards = new Map();
  const EVERY = 2000, REST = 500, LONGEST = 20000;
  const known = new Map();  // name -> the run as it was told last
  let runs = null, leftOut = 0, version = 0, drawn = "", axis = 0, rested = 0, later = 0, ended = false;

  const mb = (bytes) => !bytes || bytes < 100 ? `${bytes ?? 0} B` : bytes < 1e5 ? `${(bytes / 1e3).toFixed(2)} kB` : `${(bytes / 1e6).toFixed(2)} MB`;
  const time = (seconds) => seconds === null || seconds === undefined ? "" : seconds < 90 ? `${Math.round(seconds)} s`
    : seconds < 5400 ? `${Math.round(seconds / 60)} min` : `${(seconds / 3600).toFixed(1)} h`;
  const make = (tag, parent, kind = "") => {
    const element = document.createElement(tag);
    if (kind) element.className = kind;
    parent.append(element);
    return element;
  };

  const card = (name) => {
    const box = make("article", root, "run");
    const made = { box, title: make("h2", box), bar: make("progress", box), line: make("p", box),
      clients: make("p", box), cohort: make("ul", box, "cohort"), parts: make("div", box), messages: make("pre", box) };
    made.bar.setAttribute("aria-label", `rounds of ${name}`);
    made.cohort.setAttribute("aria-label", `clients of the newest round of ${name}`);
    made.messages.tabIndex = 0;
    made.messages.setAttribute("role", "log");
    made.messages.setAttribute("aria-label", `warnings of ${name}`);
    cards.set(name, made);
    return made;
  };

  const write = (element, text) => { if (element.textContent !== text) element.textContent = text; };

  const bytes = (parent, sections) => {
    const now = JSON.stringify(sections);
    if (parent.dataset.now === now) return;
    parent.dataset.now = now;
    parent.replaceChildren();
    for (const way of ["up", "down"]) {
      const own = Object.entries(sections).filter(([name, size]) => name.startsWith(`${way} `) && size > 0)
        .map(([name, size]) => [name.slice(way.length + 1), size]);
      const total = own.reduce((sum, [, size]) => sum + size, 0);
      if (!total) continue;
      make("p", parent).textContent = `${way} ${mb(total)}: ${own.map(([name, size]) => `${name} ${mb(size)}`).join(", ")}`;
      const bar = make("div", parent, "bytes");
      bar.setAttribute("aria-hidden", "true");
      for (const [name, size] of own) {
        const part = make("i", bar);
        part.style.width = `${100 * size / total}%`;
        part.style.background = PARTS[name] ?? "#6b7280";
        part.title = `${name} ${mb(size)}`;
      }
    }
  };

  // Each client of the newest round: its state as a mark, a colour and a word.
  const STATES = { training: "○", answered: "●", late: "◐", rejected: "✖", failed: "✖" };
  const clients = (view, run) => {
    // Nobody trains any more once the run is over.
    const word = (state) => state === "training" && run.status !== "running" ? "without an answer" : state;
    const counts = Object.keys(STATES).filter((state) => run.states[state]).map((state) => `${run.states[state]} ${word(state)}`);
    const often = run.failures.map(([client, times]) => `client ${client}${times > 1 ? ` (${times} times)` : ""}`);
    const number = run.status === "running" && run.states.training ? run.round + 1 : run.round;
    write(view.clients, (counts.length ? `clients of round ${number}: ${counts.join(", ")}` : "")
      + (often.length ? `${counts.length ? "; " : ""}failed so far: ${often.join(", ")}` : ""));
    const now = JSON.stringify([run.status, run.clients]);
    if (view.cohort.dataset.now === now) return;
    view.cohort.dataset.now = now;
    view.cohort.replaceChildren(...run.clients.map(([client, state]) => {
      const mark = document.createElement("li");
      mark.textContent = `${STATES[state] ?? "?"} ${client}`;
      mark.dataset.state = state;
      mark.title = `client ${client}: ${word(state)}`;
      mark.setAttribute("aria-label", mark.title);
      return mark;
    }));
  };

  const valued = (run, value) => run.percent ? `${(100 * value).toFixed(2)} %` : Number(value.toPrecision(4)).toString();

  const show = (run) => {
    const view = cards.get(run.name) ?? card(run.name);
    const last = run.curve.at(-1);
    if (view.run === run) return;
    view.run = run;
    write(view.title, `${run.name}: ${run.status}`);
    if (run.rounds) view.bar.max = run.rounds;
    view.bar.value = run.round;
    const measured = last ? `, test ${run.metric} ${valued(run, last[1])} (round ${last[0]})` : "";
    const left = run.eta !== null && run.eta !== undefined ? `, about ${time(run.eta)} left` : "";
    const saved = run.saved > 0 ? `, saved ${mb(run.saved)}` : "";
    const alive = run.alive === null ? "" : `, ${Math.round(100 * run.alive)} % of weights alive`;
    const failed = run.failed ? `, ${run.failed} client${run.failed === 1 ? "" : "s"} failed in the last round` : "";
    write(view.line, `round ${run.round} of ${run.rounds ?? "?"}${measured}${failed}, up ${mb(run.up)}, down ${mb(run.down)}${saved}${alive}${left}`);
    clients(view, run);
    bytes(view.parts, run.sections);
    const told = run.messages.join("\n");
    if (view.messages.textContent !== told) {
      view.messages.textContent = told;
      view.messages.scrollTop = view.messages.scrollHeight;
    }
    view.messages.hidden = !told;
  };

  const draw = (asked = false) => {
    const started = performance.now();
    if (!asked && started < rested) {
      later ||= setTimeout(() => { later = 0; if (!document.hidden) draw(); }, rested - started);
      return;
    }
    const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
    const curves = [...runs].reverse().filter((run) => run.curve.length);
    figure.hidden = !curves.length;
    const dark = matchMedia("(prefers-color-scheme: dark)").matches;
    const now = JSON.stringify([axis, dark, chart.clientWidth, curves.map((run) => [run.name, run.curve.at(-1)])]);
    if (!curves.length || now === drawn) return;
    const first = !drawn;
    drawn = now;
    const title = (run) => `test ${run.metric.replace(/</g, "&lt;")}${run.percent ? " [%]" : ""}`;
    const titles = [...new Set(curves.map(title))];
    const data = curves.map((run, i) => ({
      x: run.curve.map((row) => axis ? (row[2] + row[3]) / 1e6 : row[0]), y: run.curve.map((row) => run.percent ? 100 * row[1] : row[1]),
      name: run.name.replace(/</g, "&lt;"), mode: "lines+markers",
      line: { color: COLOURS[i % 6], dash: DASHES[(i + Math.floor(i / 6)) % 4], width: 2 },
      marker: { symbol: SYMBOLS[(i + Math.floor(i / 6)) % 6], size: 6, maxdisplayed: 24 },
      hovertemplate: `<b>%{fullData.name}</b><br>${axis ? "both directions: %{x:.3f} MB" : "round: %{x}"}<br>${title(run)}: %{y:.4g}<extra></extra>`,
    }));
    const line = { gridcolor: colour("--line"), linecolor: colour("--line"), automargin: true, rangemode: "tozero" };
    Plotly.react(chart, data, {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", margin: { l: 10, r: 14, t: 12, b: 10 },
      font: { color: colour("--ink"), size: 12 }, legend: { orientation: "h", y: -0.25 }, uirevision: axis, showlegend: curves.length > 1,
      hoverlabel: { bgcolor: colour("--raised"), font: { color: colour("--ink") } },
      xaxis: { ...line, title: { text: axis ? "sent and received by the server [MB]" : "round" } },
      yaxis: { ...line, title: { text: titles.join(", ") } },
    }, { responsive: true, displayModeBar: false });
    const took = first ? 0 : performance.now() - started;  // the first drawing builds the chart, later ones change it
    rested = performance.now() + Math.min(LONGEST, Math.max(EVERY, REST * took));
  };

  buttons.forEach((button) => button.addEventListener("click", () => {
    axis = Number(button.dataset.x);
    buttons.forEach((other) => other.setAttribute("aria-pressed", String(other === button)));
    if (runs) draw(true);
  }));

  const paint = () => {
    runs.forEach((run, i) => {
      show(run);
      const { box } = cards.get(run.name);
      if (root.children[i] !== box) root.insertBefore(box, root.children[i] ?? null);
    });
    for (const [name, view] of cards) if (!known.has(name)) { view.box.remove(); cards.delete(name); }
    const count = (status) => runs.filter((run) => run.status === status).length;
    const rest = leftOut ? `, ${leftOut} older ones are left out` : "";
    write(headline, runs.length
      ? `${count("running")} running, ${count("finished")} finished, ${count("stopped")} stopped${rest}` : "Waiting for a run.");
    draw();
    document.documentElement.dataset.drawn = "1";
  };

  const over = () =>
    write(headline, "Nobody answers any more: the run or fl-sim watch has ended. What stands here is its last word.");

  const step = async () => {
    try {
      const answer = await fetch(`state.json?since=${version}`, { cache: "no-store" });
      if (answer.status !== 204) {
        const state = await answer.json();
        state.runs.forEach((run) => known.set(run.name, run));
        for (const name of known.keys()) if (!state.names.includes(name)) known.delete(name);
        [version, leftOut, runs] = [state.version, state.left_out, state.names.map((name) => known.get(name))];
      }
      if (!document.hidden && (answer.status !== 204 || ended)) paint();
      ended = false;
    } catch (error) {
      if (!(error instanceof TypeError)) throw error;
      ended = true;
      over();
    }
    setTimeout(step, EVERY);
  };
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { if (runs) draw(true); });
  document.addEventListener("visibilitychange", () => { if (!document.hidden && runs) { paint(); if (ended) over(); } });
  step();
})();
