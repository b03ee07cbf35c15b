// -- the map of heads --------------------------------------------------------------------------

class HeadMap {
  constructor(view, box) {
    Object.assign(this, { view, box, cells: new Map(), hovered: null, drawn: null });
    this.uid = `cl${Math.random().toString(36).slice(2)}`;
  }

  draw() {
    const { n_layers, n_heads } = this.view.facts;
    const grid = this.view.get("grids")[this.view.get("method")];
    const drawn = `${this.view.get("method")}|${Boolean(grid)}|${this.view.root.dataset.theme}`;
    if (this.drawn !== drawn) {
      this.drawn = drawn;
      this.#make(grid);
    }
    const members = new Set(this.view.get("members"));
    const selected = this.view.get("selected");
    for (const [head, { cell, outline, ring, number }] of this.cells) {
      outline.style.display = members.has(head) ? "" : "none";
      const place = selected.indexOf(head);
      ring.style.display = place < 0 ? "none" : "";
      number.textContent = place > 0 ? place + 1 : "";
      cell.setAttribute("aria-selected", place >= 0);
      cell.setAttribute("aria-label", this.view.about(head).text);
    }
    const active = selected[0];
    if (active) this.svg.setAttribute("aria-activedescendant", `${this.uid}-${active}`);
    else this.svg.removeAttribute("aria-activedescendant");
    const told = this.hovered ?? active;
    this.readout.textContent = told
      ? this.view.about(told).text : `${n_layers * n_heads} heads; click one`;
  }

  #make(grid) {
    const { n_layers, n_heads } = this.view.facts;
    const clamp = (x, least, most) => Math.max(least, Math.min(most, Math.floor(x)));
    const [w, t] = [clamp(440 / n_heads, 12, 40), clamp(520 / n_layers, 12, 32)];
    const [left, top] = [30, 20];
    const limit = grid ? Math.max(...grid.mean.flat().map(Math.abs)) || 1 : 1;
    const every = (size) => Math.ceil(22 / size);
    this.cells = new Map();
    const focusedBefore = this.svg && this.svg === document.activeElement;
    const rows = [];
    // Rings are wider than their cells, and must not lie below the next ones.
    const above = s("g", { "aria-hidden": "true" });
    const [width, height] = [left + n_heads * w + 4, top + n_layers * t + 4];
    for (let layer = 0; layer < n_layers; layer++) {
      const row = s("g", { role: "row" });
      for (let index = 0; index < n_heads; index++) {
        const head = nameOf(layer, index);
        const value = grid ? grid.mean[layer][index] : 0;
        const [x, y] = [left + index * w, top + layer * t];
        const colour = mix(this.view.look.diverging, (value / limit + 1) / 2);
        const box = (inset, props) => s("rect", {
          x: x + inset, y: y + inset, width: w - 2 * inset, height: t - 2 * inset, ...props,
        });
        const cell = box(0.5, { role: "gridcell", id: `${this.uid}-${head}`, fill: css(colour), class: "cl-cell" });
        cell.addEventListener("click", (event) => {
          this.svg.focus();
          this.view.select(head, event.shiftKey);
        });
        cell.addEventListener("dblclick", () => this.view.toggle(head));
        const hover = (name) => () => {
          this.hovered = name;
          this.draw();
        };
        cell.addEventListener("pointerenter", hover(head));
        cell.addEventListener("pointerleave", hover(null));
        const outline = box(1.5, { class: "cl-outline" });
        const ring = box(-1, { class: "cl-ring" });
        const number = s("text", { x: x + w / 2, y: y + t / 2 + 4, class: "cl-number" });
        number.style.fill = light(colour) ? "#000" : "#fff";
        this.cells.set(head, { cell, outline, ring, number });
        row.append(cell, outline);
        above.append(ring, number);
      }
      rows.push(row);
    }
    const ticks = [];
    for (let i = 0; i < n_heads; i += every(w)) {
      ticks.push(s("text", { x: left + (i + 0.5) * w, y: top - 5, class: "cl-tick", "text-anchor": "middle" }, i));
    }
    for (let i = 0; i < n_layers; i += Math.ceil(14 / t)) {
      ticks.push(s("text", { x: left - 5, y: top + (i + 0.5) * t + 4, class: "cl-tick", "text-anchor": "end" }, i));
    }
    this.svg = s("svg", {
      width, height, role: "grid", tabindex: 0, class: "cl-heads", "aria-rowcount": n_layers,
      "aria-colcount": n_heads,
      "aria-label": "Heads, layers downwards. Arrow keys move, Enter adds to the circuit or removes.",
    }, s("g", { "aria-hidden": "true" }, ticks), rows, above);
    this.svg.addEventListener("keydown", (event) => this.#onKey(event));
    this.readout = h("p", { class: "cl-readout" });
    const stops = this.view.look.diverging.map(([at, colour]) => `${colour} ${100 * at}%`).join(",");
    const bar = h("div", { class: "cl-bar" });
    bar.style.background = `linear-gradient(to right, ${stops})`;
    const about = grid ? `${grid.method} on ${grid.task}, n = ${grid.n}` : "not scored yet";
    this.box.replaceChildren(
      h("div", { class: "cl-scroll" }, this.svg),
      this.readout,
      h("div", { class: "cl-legend" }, h("span", {}, num(-limit)), bar, h("span", {}, num(limit)),
        h("span", { class: "cl-quiet" }, "relevance in logits: red opposes, blue supports the task")),
      h("p", { class: "cl-quiet" }, `Layers down, heads across; outlined: in the circuit. Scores: ${about}.`),
      h("p", { class: "cl-quiet" }, "Arrow keys move, Enter adds or removes, Shift-click compares."),
    );
    if (focusedBefore) this.svg.focus();
  }

  #onKey(event) {
    const { n_layers, n_heads } = this.view.facts;
    const current = this.view.get("selected")[0];
    const steps = {
      ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1],
      Home: [0, -n_heads], End: [0, n_heads],
    };
    if (event.key in steps) {
      event.preventDefault();
      const [layer, index] = current ? placeOf(current) : [0, 0];
      const [down, right] = current ? steps[event.key] : [0, 0];
      const within = (x, n) => Math.min(n - 1, Math.max(0, x));
      const next = nameOf(within(layer + down, n_layers), within(index + right, n_heads));
      if (next !== current) this.view.select(next, event.shiftKey);
    } else if ((event.key === "Enter" || event.key === " ") && current) {
      event.preventDefault();
      this.view.toggle(current);
    }
  }
}
