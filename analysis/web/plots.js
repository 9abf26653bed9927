// The figures: drawn when they are about to be seen, in the colours of the style sheet, without what the filter hides.
(() => {
  const config = {
    responsive: true,
    displaylogo: false,
    // Named one by one: plotly.js's own choice has a button that uploads the chart to its maker.
    modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]],
    showSendToCloud: false,
    plotlyServerURL: "",
  };
  const NARROW = 480; // px
  const PRINTED = 680; // px: the width of a printed page

  const packed = JSON.parse(document.getElementById("arrays").textContent);
  const arrays = new Map();
  const KINDS = { f4: Float32Array, f8: Float64Array };

  function unpack(place) {
    if (!arrays.has(place)) {
      const [[kind, content]] = Object.entries(packed[place]);
      arrays.set(place, KINDS[kind] ? numbers(KINDS[kind], content) : repeated(content));
    }
    return arrays.get(place);
  }

  function numbers(kind, text) {
    const bytes = Uint8Array.from(atob(text), (sign) => sign.charCodeAt(0));
    return new kind(bytes.buffer);
  }

  function repeated(runs) {
    const all = [];
    for (let at = 0; at < runs.length; at += 2) for (let left = runs[at + 1]; left > 0; left--) all.push(runs[at]);
    return all;
  }

  function resolved(value) {
    if (Array.isArray(value)) return value.map(resolved);
    if (value === null || typeof value !== "object") return value;
    if ("$" in value) return unpack(value.$);
    return Object.fromEntries(Object.entries(value).map(([key, inner]) => [key, resolved(inner)]));
  }

  const figures = new Map();
  function figure(name) {
    if (!figures.has(name)) {
      figures.set(name, resolved(JSON.parse(document.getElementById(`figure-${name}`).textContent)));
    }
    return figures.get(name);
  }

  // Every array with a value per point loses the points that the filter hides; what has no facets stays.
  function filtered(trace) {
    const facets = trace.customdata;
    if (!facets || !filters.active()) return trace;
    const keep = Array.from(facets, filters.keep);
    const cut = (value) => {
      if (Array.isArray(value) || ArrayBuffer.isView(value)) {
        return value.length === keep.length ? value.filter((_, at) => keep[at]) : value;
      }
      if (value === null || typeof value !== "object") return value;
      return Object.fromEntries(Object.entries(value).map(([key, inner]) => [key, cut(inner)]));
    };
    const shown = { ...trace };
    for (const key of ["x", "y", "text", "error_x", "error_y", "customdata", "marker"]) {
      if (shown[key] !== undefined) shown[key] = cut(shown[key]);
    }
    return shown;
  }

  function inks() {
    const style = getComputedStyle(document.documentElement);
    return (name) => style.getPropertyValue(name).trim();
  }

  function themed({ data, layout }, narrow) {
    const colour = inks();
    const axis = { gridcolor: colour("--rule"), linecolor: colour("--faint"), tickcolor: colour("--faint") };
    const dressed = { ...layout, font: { ...layout.font, color: colour("--ink") } };
    for (const key of Object.keys(layout)) {
      if (/^[xy]axis\d*$/.test(key)) dressed[key] = { ...layout[key], ...axis };
    }
    dressed.hoverlabel = {
      ...layout.hoverlabel,
      bgcolor: colour("--ground"),
      bordercolor: colour("--faint"),
      font: { color: colour("--ink") },
    };
    dressed.modebar = { bgcolor: "rgba(0,0,0,0)", color: colour("--faint"), activecolor: colour("--ink") };
    if (narrow) fit(dressed);
    const traces = data.map(filtered).map((trace) => {
      if (trace.meta === "ink") return { ...trace, marker: { ...trace.marker, color: colour("--ink") } };
      return trace;
    });
    return [traces, dressed];
  }

  // On a phone: smaller letters, titles of axes on several lines, long names cut (the table has them whole).
  function fit(layout) {
    layout.font = { ...layout.font, size: 11 };
    layout.margin = { ...layout.margin, l: 44, r: 6 };
    for (const key of Object.keys(layout)) {
      if (!/^[xy]axis\d*$/.test(key)) continue;
      const axis = (layout[key] = { ...layout[key] });
      if (axis.title) axis.title = { ...axis.title, text: lines(axis.title.text || ""), font: { size: 11 } };
      if (axis.ticktext) axis.ticktext = axis.ticktext.map((text) => (text.length > 18 ? `${text.slice(0, 17)}…` : text));
    }
  }

  function lines(text) {
    const words = text.split(" ");
    const folded = [words.shift()];
    for (const word of words) {
      if (`${folded.at(-1)} ${word}`.length <= 32) folded.push(`${folded.pop()} ${word}`);
      else folded.push(word);
    }
    return folded.join("<br>");
  }

  const drawn = new Set();
  function draw(place) {
    drawn.add(place);
    place.removeAttribute("aria-busy");
    const width = theme.printing() ? PRINTED : place.clientWidth;
    const [data, layout] = themed(figure(place.dataset.figure), width < NARROW);
    if (theme.printing()) layout.width = PRINTED;
    const bar = width < NARROW ? false : "hover";
    const image = { format: "png", scale: 2, filename: place.dataset.figure };
    return Plotly.react(place, data, layout, { ...config, displayModeBar: bar, toImageButtonOptions: image });
  }

  const places = Array.from(document.querySelectorAll("[data-figure]"));
  const watch = new IntersectionObserver(
    (entries) => {
      for (const { isIntersecting, target } of entries) {
        if (!isIntersecting) continue;
        watch.unobserve(target);
        draw(target);
      }
    },
    { rootMargin: "400px 0px" },
  );
  function expect(place) {
    place.setAttribute("aria-busy", "true"); // until it is drawn as it now should be
    watch.observe(place);
  }
  places.forEach(expect);

  // What is out of sight is drawn anew when it comes into sight.
  function redraw() {
    drawn.forEach(expect);
    drawn.clear();
  }
  let narrow = window.innerWidth < NARROW;
  window.addEventListener("resize", () => {
    if (narrow === window.innerWidth < NARROW || theme.printing()) return;
    narrow = !narrow;
    redraw();
  });
  filters.follow(redraw);
  theme.follow(() => {
    if (!theme.printing()) redraw();
  });
  window.addEventListener("beforeprint", () => {
    theme.print(true);
    places.forEach(draw);
  });
  window.addEventListener("afterprint", () => theme.print(false));
})();
