"use strict";

// Light or dark: as the system says, unless the reader chose. Stands in the head, so that a dark page never flashes.
const theme = (() => {
  const system = window.matchMedia("(prefers-color-scheme: dark)");
  const followers = [];
  let chosen = "auto";
  let printing = false;
  try {
    chosen = window.localStorage.getItem("raysparse-theme") || "auto";
  } catch {
    // A page from a file may have no storage: then the choice lasts as long as the page.
  }

  function apply() {
    const dark = !printing && (chosen === "auto" ? system.matches : chosen === "dark");
    document.documentElement.dataset.theme = dark ? "dark" : "light";
    followers.forEach((follow) => follow());
  }

  function choose(value) {
    chosen = value;
    try {
      window.localStorage.setItem("raysparse-theme", value);
    } catch {
      // See above.
    }
    apply();
  }

  function print(on) {
    printing = on;
    apply();
  }

  system.addEventListener("change", apply);
  apply();
  return { choose, print, chosen: () => chosen, printing: () => printing, follow: (call) => followers.push(call) };
})();
