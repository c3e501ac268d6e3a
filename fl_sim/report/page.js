"use strict";
// Draws each figure's chosen view in the page's colours, and again when those change: dark mode, printing.
(async () => {
  const coarse = matchMedia("(pointer: coarse)");
  const style = (element) => getComputedStyle(element);
  const colour = (name) => style(document.documentElement).getPropertyValue(name).trim();

  // -- tables that are wider than the page ----------------------------------------------------------------------------
  const scrolls = [...document.querySelectorAll(".scroll")];
  const cue = (box) => {
    const wider = box.scrollWidth > box.clientWidth + 1;
    box.classList.toggle("wider", wider);
    box.tabIndex = wider ? 0 : -1; // what does not scroll is no stop of the tab key
    box.classList.toggle("ended", box.scrollLeft + box.clientWidth >= box.scrollWidth - 1);
  };
  for (const box of scrolls) {
    box.addEventListener("scroll", () => cue(box), { passive: true });
    box.closest("details")?.addEventListener("toggle", () => cue(box));
  }
  addEventListener("resize", () => scrolls.forEach(cue));
  scrolls.forEach(cue);

  // -- the library ----------------------------------------------------------------------------------------------------
  const library = async () => {
    const packed = Uint8Array.from(atob(document.getElementById("plotly").textContent), (c) => c.charCodeAt(0));
    const unpacked = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
    const script = document.createElement("script");
    script.textContent = await new Response(unpacked).text();
    document.head.append(script);
  };
  if (typeof DecompressionStream === "undefined") {
    document.documentElement.dataset.old = "";
    return;
  }
  await library();

  // -- figures --------------------------------------------------------------------------------------------------------
  const layout = (own) => {
    const axis = {
      gridcolor: colour("--line"), linecolor: colour("--line"), zerolinecolor: colour("--line"), tickcolor: colour("--line"),
      automargin: true, title: { standoff: 10 },
    };
    return {
      ...own,
      template: { layout: {
        paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", colorway: [colour("--ink")],
        font: { color: colour("--ink"), size: 12, family: style(document.body).fontFamily },
        hoverlabel: { bgcolor: colour("--raised"), bordercolor: colour("--line"), font: { color: colour("--ink") }, align: "left" },
        xaxis: axis, yaxis: axis,
      } },
      margin: { l: 10, r: 14, t: 12, b: 10 },
      showlegend: false,
      // On a touch screen a drag scrolls the page.
      dragmode: coarse.matches ? false : "zoom",
    };
  };

  const figures = [...document.querySelectorAll(".figure")].map((section) => ({
    title: section.querySelector("h2").textContent,
    chart: section.querySelector(".chart"),
    said: section.querySelector(".said"),
    buttons: [...section.querySelectorAll(".views button")],
    keys: [...section.querySelectorAll(".legend button")],
    tools: section.querySelector(".tools"),
    views: JSON.parse(section.querySelector("script").textContent),
    hidden: new Set(), shown: 0, at: null,
  }));

  const traces = (figure) => structuredClone(figure.views[figure.shown].data)
    .map((trace) => ({ ...trace, visible: !figure.hidden.has(trace.legendgroup) }));

  // `react` with the layout as it was also undoes a zoom.
  const draw = (figure) => Plotly.react(
    figure.chart, traces(figure), layout(structuredClone(figure.views[figure.shown].layout)),
    { responsive: true, displayModeBar: false, doubleClick: "reset" },
  );

  const save = (figure, format) => {
    const shown = layout(structuredClone(figure.views[figure.shown].layout));
    const view = figure.buttons[figure.shown]?.textContent;
    const title = { text: figure.title + (view ? `: ${view}` : ""), font: { size: 15 }, x: 0.01, xanchor: "left" };
    // A picture has no page around it: it brings paper, title and legend of its own.
    const legend = { orientation: "h", y: -0.22, yanchor: "top" };
    const own = { ...shown, title, legend, showlegend: figure.keys.length > 0, paper_bgcolor: colour("--paper"),
      margin: { l: 60, r: 20, t: 50, b: 60 } };
    const name = title.text.toLowerCase().replace(/[^a-z0-9]+/g, "-").replace(/^-|-$/g, "").slice(0, 80);
    return Plotly.downloadImage({ data: traces(figure), layout: own },
      { format, filename: name, width: 900, height: figure.chart.clientHeight + 110, scale: 2 });
  };

  // Arrow keys read a chart: left and right along a series, up and down from one series to the next.
  const read = (figure, along, across) => {
    const drawn = figure.chart.data.flatMap((trace, curve) => trace.visible && trace.hoverinfo !== "skip" ? [curve] : []);
    if (!drawn.length) return;
    const before = figure.at ?? { curve: drawn[0], point: -1 };
    const place = Math.max(0, drawn.indexOf(before.curve));
    const curve = drawn[(place + across + drawn.length) % drawn.length];
    const trace = figure.chart.data[curve];
    const last = (trace.z ? trace.z.length * trace.x.length : trace.x.length) - 1;
    const point = Math.min(last, Math.max(0, before.point + along));
    figure.at = { curve, point };
    const cell = trace.z ? [Math.floor(point / trace.x.length), point % trace.x.length] : null;
    const told = trace.z
      ? `${trace.y[cell[0]]}, ${trace.x[cell[1]]}: ${trace.z[cell[0]][cell[1]] ?? "none"}`
      : trace.orientation === "h"
        ? `${figure.chart.layout.annotations[point]?.text ?? point}: ${trace.x[point]}`
        : `${trace.x[point]}: ${trace.y[point] ?? "none"}`;
    const axes = ["xaxis", "yaxis"].map((name) => figure.chart.layout[name].title?.text).filter(Boolean).join(" and ");
    figure.said.textContent = `${trace.name ?? ""} ${told} (${axes})`.replace(/<[^>]*>/g, "").trim();
    Plotly.Fx.hover(figure.chart, [{ curveNumber: curve, pointNumber: cell ?? point }]);
  };
  const KEYS = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

  for (const figure of figures) {
    figure.buttons.forEach((button, index) => button.addEventListener("click", () => {
      figure.shown = index;
      figure.at = null;
      figure.buttons.forEach((other, i) => other.setAttribute("aria-pressed", String(i === index)));
      draw(figure);
    }));
    for (const key of figure.keys) {
      key.addEventListener("click", () => {
        const name = key.dataset.key;
        if (!figure.hidden.delete(name)) figure.hidden.add(name);
        key.setAttribute("aria-pressed", String(!figure.hidden.has(name)));
        draw(figure);
      });
    }
    figure.chart.addEventListener("keydown", (event) => {
      if (!(event.key in KEYS) || event.ctrlKey || event.metaKey || event.altKey) return;
      event.preventDefault();
      read(figure, ...KEYS[event.key]);
    });
    figure.chart.addEventListener("blur", () => Plotly.Fx.unhover(figure.chart));
    const actions = { reset: () => draw(figure), png: () => save(figure, "png"), svg: () => save(figure, "svg") };
    for (const tool of figure.tools.querySelectorAll("button")) {
      tool.addEventListener("click", () => actions[tool.dataset.do]());
    }
  }
  const all = () => Promise.all(figures.map(draw));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", all);
  matchMedia("print").addEventListener("change", all);
  await all();
  document.documentElement.dataset.drawn = String(figures.length);
})();
