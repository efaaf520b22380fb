"use strict";
// What the page does beyond its text: the theme, the numbers under the pointer, and the choice of pictures.
(() => {
  const root = document.documentElement;
  const button = document.getElementById("theme");
  const system = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
  const label = () => { button.textContent = isDark() ? "Light theme" : "Dark theme"; };
  button.addEventListener("click", () => { root.dataset.theme = isDark() ? "light" : "dark"; label(); });
  system.addEventListener("change", label);
  button.hidden = false;
  label();

  for (const plot of document.querySelectorAll(".plot")) {
    const svg = plot.querySelector("svg"), tip = plot.querySelector(".tip");
    const hits = [...plot.querySelectorAll(".hit")];
    const texts = hits.map((hit) => { const title = hit.querySelector("title"); title.remove(); return title.textContent; });
    const guide = document.createElementNS(svg.namespaceURI, "path");
    guide.setAttribute("class", "guide");
    svg.append(guide);
    let at = -1;
    const show = (i) => {
      at = i;
      hits.forEach((hit, k) => hit.classList.toggle("on", k === i));
      tip.hidden = i < 0;
      guide.setAttribute("d", "");
      if (i < 0) return;
      const x = Number(hits[i].dataset.x), view = svg.viewBox.baseVal;
      guide.setAttribute("d", `M${x} 16V262`);
      tip.replaceChildren(...texts[i].split("; ").map((line) => {
        const row = document.createElement("div");
        row.textContent = line;
        return row;
      }));
      const left = (x / view.width) * plot.clientWidth;
      const room = plot.clientWidth - tip.offsetWidth;
      const beside = left + 12 <= room ? left + 12 : left - tip.offsetWidth - 12;
      tip.style.left = `${Math.max(0, Math.min(beside, room))}px`;
    };
    hits.forEach((hit, i) => hit.addEventListener("pointerenter", () => show(i)));
    plot.addEventListener("pointerleave", () => { if (document.activeElement !== plot) show(-1); });
    plot.addEventListener("focus", () => { if (at < 0 && plot.matches(":focus-visible")) show(0); });
    plot.addEventListener("blur", () => show(-1));
    plot.addEventListener("keydown", (event) => {
      const moves = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: hits.length - 1 };
      if (event.key === "Escape") show(-1);
      if (!(event.key in moves)) return;
      event.preventDefault();
      show(Math.max(0, Math.min(hits.length - 1, moves[event.key])));
    });
  }

  for (const gallery of document.querySelectorAll(".gallery")) {
    const sampler = gallery.querySelector(".choose-sampler"), steps = gallery.querySelector(".choose-steps");
    const names = [...gallery.querySelectorAll(".choose-name")], output = gallery.querySelector("output");
    const update = () => {
      const own = sampler ? String(sampler.selectedIndex) : null;
      const count = steps ? steps.dataset.steps.split(" ")[steps.value] : null;
      if (steps) {
        output.textContent = count;
        steps.setAttribute("aria-valuetext", `${count} steps`);
      }
      for (const frame of gallery.querySelectorAll(".frame")) {
        const other = own !== null && frame.dataset.sampler !== own;
        frame.hidden = other || (count !== null && frame.dataset.steps !== count);
      }
      for (const name of names) {
        for (const figure of gallery.querySelectorAll(`figure[data-name="${name.value}"]`)) figure.hidden = !name.checked;
      }
    };
    gallery.querySelector(".controls").hidden = !(sampler || steps || names.length);
    gallery.addEventListener("input", update);
    update();
  }
})();
