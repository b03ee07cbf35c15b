// -- the circuit -------------------------------------------------------------------------------

class CircuitBox {
  constructor(view, box) {
    Object.assign(this, { view, box, saveNote: null, copied: null, lastKept: null });
    this.first = [...view.get("members")];
    this.path = h("input", {
      type: "text", value: "circuit.json", "aria-label": "file to write", "data-key": "path",
      oninput: () => {
        // Another name has not been asked about yet.
        if (this.saveNote === null) return;
        this.saveNote = null;
        this.draw();
      },
    });
  }

  draw() {
    const members = this.view.get("members");
    const { n_layers, n_heads, computes } = this.view.facts;
    const names = members.map((m) => JSON.stringify(m)).join(", ");
    const code = `cl.Circuit.of([${names}], n_layers=${n_layers}, n_heads=${n_heads})`;
    const area = h("textarea", { readonly: true, rows: 2, "aria-label": "Python", "data-key": "code" });
    area.value = code;
    const same = members.join() === this.first.join();
    const note = this.saveNote;
    const parts = [
      h("h4", {}, `Circuit: ${members.length} of ${n_layers * n_heads} heads`),
      h("p", { class: "cl-members" }, members.join(" ") || "no heads"),
      computes ? this.kept() : h("p", { class: "cl-quiet" },
        "Faithfulness of an edited circuit needs the model: explore(model, task, baseline, …)."),
      this.view.facts.curve ? this.curve(members) : null,
      h("div", { class: "cl-buttons" },
        h("button", { type: "button", "data-key": "reset", disabled: same,
          onclick: () => this.view.set({ members: [...this.first] }) }, "back to the start"),
        h("button", { type: "button", "data-key": "copy", onclick: () => this.copy(area) }, "copy Python"),
        h("span", { class: "cl-quiet", role: "status" }, this.copied ?? "")),
      area,
      h("div", { class: "cl-buttons" }, this.path,
        h("button", { type: "button", "data-key": "save",
          onclick: () => this.save(Boolean(this.saveNote?.exists)) }, note?.exists ? "overwrite" : "save circuit")),
    ];
    if (note?.exists) parts.push(h("p", { role: "status" }, `${note.exists} exists: press again to overwrite it.`));
    if (note?.saved) parts.push(h("p", { role: "status" }, `Saved ${note.heads} heads to ${note.saved}`));
    if (note?.ok === false) parts.push(this.view.problem(null, note));
    this.copied = null;
    refill(this.box, parts);
  }

  kept() {
    const key = this.view.key("circuit");
    const answer = this.view.answers.of(key);
    const sample = this.view.answers.of(this.view.key("sample"));
    if (answer?.ok === false) return this.view.problem(key, answer);
    if (answer) this.lastKept = { answer, language: this.view.get("language") };
    const shown = answer ?? (this.lastKept?.language === this.view.get("language") ? this.lastKept.answer : null);
    if (!shown) return sample?.ok === false ? null : this.view.waiting("measuring the circuit…");
    return h("div", { class: answer ? "cl-kept" : "cl-kept cl-stale", "aria-live": "polite" },
      h("p", {}, h("b", {}, `f = ${num(shown.f)}`), ` (95 % interval ${range(shown.interval ?? [null, null])})`),
      h("p", {}, h("b", {}, `accuracy ${percent(shown.accuracy)}`),
        ` (all heads ${percent(shown.full_accuracy)}, none ${percent(shown.empty_accuracy)})`),
      h("p", { class: "cl-quiet" }, answer
        ? `f: share of the margin kept with all other heads mean-ablated. A sample: n = ${shown.n} of ` +
          `${sample?.n_held_out ?? "the"} held-out examples in ${this.view.get("language")}.`
        : "of the circuit before; measuring this one…"));
  }

  curve(members) {
    const { sizes, f, low, high, random, method, accuracy, n } = this.view.facts.curve;
    const [width, height, pad] = [300, 96, 24];
    const total = sizes[sizes.length - 1];
    const all = [...f, ...low, ...high, ...random, 0, 1];
    const [least, most] = [Math.min(...all), Math.max(...all)];
    const x = (k) => pad + (k / total) * (width - pad - 8);
    const y = (v) => 6 + (1 - (v - least) / (most - least)) * (height - 26);
    const line = (values) => values.map((v, i) => `${i ? "L" : "M"}${x(sizes[i])},${y(v)}`).join("");
    const back = low.map((v, i) => `L${x(sizes[i])},${y(v)}`).reverse().join("");
    const band = `${line(high)}${back}Z`;
    const at = sizes.indexOf(members.length);
    const grid = this.view.get("grids")[method];
    const top = grid && members.every((m) => {
      const [layer, index] = placeOf(m);
      return grid.rank[layer][index] <= members.length;
    });
    const text = at >= 0 && top
      ? `Saved curve: these top ${members.length} heads by ${method} keep f = ${num(f[at])} ` +
        `(95 % interval ${range([low[at], high[at]])}), accuracy ${percent(accuracy[at])}, n = ${n}.`
      : `Saved curve: f of the top heads by ${method} (n = ${n}), not of a circuit chosen by hand.`;
    const label = (v) => s("text", { x: pad - 4, y: y(v) + 4, class: "cl-tick", "text-anchor": "end" }, v);
    return h("div", {}, s("svg", { width, height, role: "img", "aria-label": text },
      low.length ? s("path", { d: band, class: "cl-band" }) : null,
      random.length ? s("path", { d: line(random), class: "cl-random" }) : null,
      s("path", { d: line(f), class: "cl-line" }),
      s("line", { x1: x(members.length), x2: x(members.length), y1: 4, y2: height - 18, class: "cl-here" }),
      [0, 1].map(label),
      s("text", { x: width - 8, y: height - 4, class: "cl-tick", "text-anchor": "end" },
        `heads kept, of ${total}${random.length ? " (dashed: random)" : ""}`)),
    h("p", { class: "cl-quiet" }, text));
  }

  save(overwrite) {
    const question = { kind: "save", path: this.path.value, members: this.view.get("members"), overwrite };
    this.view.answers.act(question, (reply) => {
      this.saveNote = reply;
    });
  }

  async copy(area) {
    area.select();
    try {
      await navigator.clipboard.writeText(area.value);
      this.copied = "Copied.";
    } catch {
      this.copied = "Selected: copy it with Ctrl+C.";
    }
    this.draw();
  }
}
