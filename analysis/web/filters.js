// The bar on top: which methods, S and p are shown, in the figures and in the tables alike. A facet is [method, S, p];
// figures hold one per point, table rows one each, by its place in `facets`.
const filters = (() => {
  const DENSE = "dense";
  const MANY = 12; // values of S or p beyond which a range takes the place of a box per value
  const facets = JSON.parse(document.getElementById("facets").textContent);
  const followers = [];
  const off = { method: new Set(), S: new Set(), p: new Set() };
  const range = { S: [-Infinity, Infinity], p: [-Infinity, Infinity] };
  const AXES = [["method", 0], ["S", 1], ["p", 2]];
  let kept = facets.map(() => true);

  // Dense is what all is measured against: S and p do not take it away, its own box does.
  function keeps([method, S, p]) {
    if (off.method.has(method)) return false;
    if (method === DENSE) return true;
    const within = (name, value) =>
      !off[name].has(value) && (value === null || (value >= range[name][0] && value <= range[name][1]));
    return within("S", S) && within("p", p);
  }

  function change() {
    kept = facets.map(keeps);
    const active = kept.some((keep) => !keep);
    document.documentElement.classList.toggle("filtering", active);
    for (const note of document.querySelectorAll(".unfiltered")) note.hidden = !active;
    followers.forEach((follow) => follow());
    say(active);
  }

  function element(name, settings = {}, ...children) {
    const made = Object.assign(document.createElement(name), settings);
    made.append(...children);
    return made;
  }

  function values(place) {
    const own = facets.filter(([method]) => place === 0 || method !== DENSE).map((facet) => facet[place]);
    const order = (a, b) => (a === null) - (b === null) || (a > b) - (a < b);
    return Array.from(new Set(own)).sort(place === 0 ? (a, b) => (b === DENSE) - (a === DENSE) || order(a, b) : order);
  }

  function boxes(name, found) {
    return found.map((value) => {
      const box = element("input", { type: "checkbox", checked: true });
      box.dataset.filter = name;
      box.addEventListener("change", () => {
        off[name][box.checked ? "delete" : "add"](value);
        change();
      });
      return element("label", {}, box, value === null ? "none" : typeof value === "number" ? short(value) : value);
    });
  }

  function ends(name, found) {
    const numbers = found.filter((value) => value !== null);
    const limits = [Math.min(...numbers), Math.max(...numbers)];
    const inputs = limits.map((limit, end) => {
      const input = element("input", { type: "number", step: "any", placeholder: short(limit) });
      input.dataset.filter = name;
      input.setAttribute("aria-label", `${name} ${end ? "at most" : "at least"}`);
      input.addEventListener("input", () => {
        range[name][end] = input.value === "" ? (end ? Infinity : -Infinity) : Number(input.value);
        change();
      });
      return input;
    });
    const none = found.includes(null) ? boxes(name, [null]) : [];
    return [element("label", {}, "from ", inputs[0]), element("label", {}, "to ", inputs[1]), ...none];
  }

  const short = (value) => String(Number(value.toPrecision(4)));
  const status = element("span", { className: "status" });
  status.setAttribute("role", "status");
  const reset = element("button", { type: "button", textContent: "Show all", hidden: true });

  function say(active) {
    const names = AXES.filter(([name]) => off[name].size || (range[name] && range[name].some(Number.isFinite)));
    status.textContent = active
      ? `Filtered by ${names.map(([name]) => name).join(", ")}. Words, fronts and bands speak of all trials.`
      : "All shown";
    reset.hidden = !active;
  }

  function build() {
    const rows = AXES.map(([name, place]) => [name, values(place)]).filter(([, found]) => found.length > 1);
    const sets = rows.map(([name, found]) =>
      element("fieldset", {}, element("legend", { textContent: name }),
        ...(name !== "method" && found.length > MANY ? ends(name, found) : boxes(name, found))),
    );
    const panel = element("details", { className: "filter" }, element("summary", { textContent: "Filter" }), ...sets);
    reset.addEventListener("click", () => {
      for (const name of Object.keys(off)) off[name].clear();
      for (const name of Object.keys(range)) range[name] = [-Infinity, Infinity];
      for (const input of panel.querySelectorAll("input")) {
        if (input.type === "checkbox") input.checked = true;
        else input.value = "";
      }
      change();
    });
    // What is open over the page goes away as such things do.
    document.addEventListener("keydown", (event) => {
      if (event.key === "Escape" && panel.open) {
        panel.open = false;
        panel.querySelector("summary").focus();
      }
    });
    document.addEventListener("click", (event) => {
      if (panel.open && !panel.contains(event.target) && event.target !== reset) panel.open = false;
    });
    const bar = document.getElementById("bar");
    if (sets.length) bar.append(panel, status, reset);
    const choice = element("select", {});
    choice.setAttribute("aria-label", "Colours");
    for (const name of ["auto", "light", "dark"]) choice.append(element("option", { value: name, textContent: name }));
    choice.value = theme.chosen();
    choice.addEventListener("change", () => theme.choose(choice.value));
    bar.append(element("label", { className: "theme" }, "Theme ", choice));
    say(false);
  }

  build();
  return { keep: (place) => kept[place], active: () => kept.some((keep) => !keep), follow: (call) => followers.push(call) };
})();
