"use strict";
// Draws each figure's chosen view in the page's colours, and again when those change: dark mode, printing.
(() => {
  const coarse = matchMedia("(pointer: coarse)");
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  const layout = (own) => {
    const axis = {
      gridcolor: colour("--line"), linecolor: colour("--line"), zerolinecolor: colour("--line"), tickcolor: colour("--line"),
      automargin: true, title: { standoff: 10 },
    };
    return {
      ...own,
      template: { layout: {
        paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", colorway: [colour("--ink")],
        font: { color: colour("--ink"), size: 12, family: getComputedStyle(document.body).fontFamily },
        xaxis: axis, yaxis: axis,
      } },
      margin: { l: 10, r: 14, t: 12, b: 10 },
      showlegend: false,
      // On a touch screen a drag scrolls the page.
      dragmode: coarse.matches ? false : "zoom",
    };
  };

  const figures = [...document.querySelectorAll(".figure")].map((section) => ({
    chart: section.querySelector(".chart"),
    buttons: [...section.querySelectorAll(".views button")],
    views: JSON.parse(section.querySelector("script").textContent),
    shown: 0,
  }));

  const draw = (figure) => {
    const view = structuredClone(figure.views[figure.shown]);
    return Plotly.react(figure.chart, view.data, layout(view.layout), { responsive: true, displayModeBar: false });
  };

  for (const figure of figures) {
    figure.buttons.forEach((button, index) => button.addEventListener("click", () => {
      figure.shown = index;
      figure.buttons.forEach((other, i) => other.setAttribute("aria-pressed", String(i === index)));
      draw(figure);
    }));
  }
  const all = () => Promise.all(figures.map(draw));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", all);
  matchMedia("print").addEventListener("change", all);
  all().then(() => { document.documentElement.dataset.drawn = String(figures.length); });
})();
