"use strict";
(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const config = {
    responsive: true,
    displaylogo: false,
    // Named one by one: plotly.js's own choice has a button that uploads the chart to its maker.
    modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]],
    showSendToCloud: false,
    plotlyServerURL: "",
  };

  // Hover texts come as runs [text, count].
  for (const figure of Object.values(figures)) {
    for (const trace of figure.data) {
      if (trace.text) trace.text = trace.text.flatMap(([text, count]) => Array(count).fill(text));
    }
  }

  // Ink, grid and ground come from the style sheet, so that one figure serves light and dark.
  function ink() {
    const style = getComputedStyle(document.documentElement);
    return (name) => style.getPropertyValue(name).trim();
  }

  function themed(figure) {
    const colour = ink();
    const axis = { gridcolor: colour("--rule"), linecolor: colour("--faint"), tickcolor: colour("--faint") };
    const layout = { ...figure.layout };
    layout.font = { ...layout.font, color: colour("--ink") };
    layout.xaxis = { ...layout.xaxis, ...axis };
    layout.yaxis = { ...layout.yaxis, ...axis };
    layout.hoverlabel = {
      ...layout.hoverlabel,
      bgcolor: colour("--ground"),
      bordercolor: colour("--faint"),
      font: { color: colour("--ink") },
    };
    layout.modebar = { bgcolor: "rgba(0,0,0,0)", color: colour("--faint"), activecolor: colour("--ink") };
    const data = figure.data.map((trace) =>
      trace.meta === "ink" ? { ...trace, marker: { ...trace.marker, color: colour("--ink") } } : trace,
    );
    return [data, layout];
  }

  function draw(place) {
    const [data, layout] = themed(figures[place.dataset.figure]);
    const narrow = place.clientWidth < 480;
    if (narrow) {
      layout.font = { ...layout.font, size: 11 };
      layout.margin = { ...layout.margin, l: 44, r: 6 };
    }
    return Plotly.react(place, data, layout, { ...config, displayModeBar: narrow ? false : "hover" });
  }

  const places = Array.from(document.querySelectorAll("[data-figure]"));
  places.forEach(draw);
  const redraw = () => places.forEach(draw);
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
})();
