// -- the view ----------------------------------------------------------------------------------

class View {
  constructor(model, root) {
    this.model = model;
    this.facts = model.get("facts");
    this.box = {};
    for (const part of ["controls", "example", "map", "circuit", "panel", "status"]) {
      this.box[part] = h("div", { class: `cl-${part}` });
    }
    this.box.status.setAttribute("role", "status");
    this.map = new HeadMap(this, this.box.map);
    this.circuit = new CircuitBox(this, this.box.circuit);
    this.panel = new Panel(this, this.box.panel);
    this.root = h("div", {
      class: "cl-explorer",
      // JupyterLab would take arrow keys and Enter for its own shortcuts.
      "data-lm-suppress-shortcuts": "true",
      onkeydown: (event) => event.stopPropagation(),
    },
      h("div", { class: "cl-head" }, h("strong", {}, "Explorer"), this.#title(), this.box.status),
      this.box.controls,
      this.box.example,
      h("div", { class: "cl-columns" },
        h("div", { class: "cl-left" }, this.box.map, this.box.circuit),
        this.box.panel),
    );
    root.append(this.root);
    this.answers = new Answers(model, (has) => this.lacking(has), () => this.draw());
    this.listeners = ["grids", "method", "language", "example", "selected", "members"].map(
      (name) => [`change:${name}`, () => this.answers.next()],
    );
    this.listeners.push(["change:mode", () => this.theme()]);
    this.listeners.forEach(([event, call]) => model.on(event, call));
    this.observer = new MutationObserver(() => this.theme());
    this.observer.observe(document.body, { attributes: true });
    this.media = window.matchMedia("(prefers-color-scheme: dark)");
    this.onMedia = () => this.theme();
    this.media.addEventListener("change", this.onMedia);
    this.theme();
    this.answers.next();
  }

  close() {
    this.listeners.forEach(([event, call]) => this.model.off(event, call));
    this.media.removeEventListener("change", this.onMedia);
    this.observer.disconnect();
    this.answers.close();
  }

  #title() {
    const { model, task } = this.facts;
    return h("span", { class: "cl-quiet" }, [model, task].filter(Boolean).join(" · "));
  }

  get(name) {
    return this.model.get(name);
  }

  set(values) {
    for (const [name, value] of Object.entries(values)) this.model.set(name, value);
    this.model.save_changes();
  }

  theme() {
    const theme = isDark(this.get("mode")) ? "dark" : "light";
    if (theme === this.root.dataset.theme) return;
    this.root.dataset.theme = theme;
    this.look = this.facts.looks[theme];
    for (const name of ["ink", "quiet", "grid", "paper", "band"]) {
      this.root.style.setProperty(`--cl-${name}`, this.look[name]);
    }
    this.map.drawn = null;
    if (this.answers) this.draw();
  }

  // -- what the present state lacks ------------------------------------------------------------

  key(kind, head) {
    const language = this.get("language");
    if (kind === "look") return `look|${language}|${this.get("example")}|${head}`;
    if (kind === "effect") return `effect|${language}|${head}`;
    if (kind === "circuit") return `circuit|${language}|${this.get("members").join()}`;
    if (kind === "sample") return `sample|${language}`;
    return `scores|${this.get("method")}`;
  }

  lacking(has) {
    if (!this.facts.computes) return null;
    const [language, example] = [this.get("language"), this.get("example")];
    const heads = this.get("selected");
    const wanted = [];
    if (!(this.get("method") in this.get("grids"))) {
      wanted.push({ key: this.key("scores"), question: { kind: "scores", method: this.get("method") } });
    }
    wanted.push({ key: this.key("sample"), question: { kind: "sample", language } });
    if (this.answers?.of(this.key("sample"))?.ok !== false) {
      for (const kind of ["look", "effect"]) {
        for (const head of heads) {
          wanted.push({ key: this.key(kind, head), question: { kind, language, example, head } });
        }
      }
      const members = this.get("members");
      wanted.push({ key: this.key("circuit"), question: { kind: "circuit", language, members } });
    }
    return wanted.find(({ key }) => !has(key)) ?? null;
  }

  // -- actions ---------------------------------------------------------------------------------

  select(head, more = false) {
    const before = this.get("selected");
    const rest = more ? before.filter((other) => other !== head) : [];
    const again = more && before[0] === head && rest.length > 0;
    this.set({ selected: again ? rest : [head, ...rest].slice(0, COMPARED) });
  }

  toggle(head) {
    const members = this.get("members");
    const next = members.includes(head) ? members.filter((m) => m !== head) : [...members, head];
    // In the order that Python keeps, so that the same circuit has the same key.
    next.sort((a, b) => {
      const [p, q] = [placeOf(a), placeOf(b)];
      return p[0] - q[0] || p[1] - q[1];
    });
    this.circuit.saveNote = null;
    this.set({ members: next });
  }

  // -- drawing ---------------------------------------------------------------------------------

  draw() {
    const busy = this.answers.flying !== null;
    this.root.setAttribute("aria-busy", busy);
    const doing = {
      scores: "scoring heads", sample: "running the examples", look: "looking at the head",
      effect: "ablating the head", circuit: "measuring the circuit", save: "saving",
    };
    refill(this.box.status, busy ? [
      h("span", { class: "cl-spinner", "aria-hidden": "true" }),
      this.answers.late
        ? "no answer yet: long work, or the kernel is busy with another cell or gone"
        : `${doing[this.answers.flying.question.kind]}…`,
    ] : [this.facts.computes ? "ready" : "saved results, no model"]);
    this.drawControls();
    this.map.draw();
    this.circuit.draw();
    this.panel.draw();
  }

  problem(key, answer) {
    return h("div", { class: "cl-error", role: "alert" }, answer.error,
      answer.detail ? h("details", {}, h("summary", {}, "details"), h("pre", {}, answer.detail)) : null,
      key ? h("button", { type: "button", onclick: () => this.answers.forget(key) }, "try again") : null);
  }

  waiting(text) {
    return h("p", { class: "cl-quiet" }, h("span", { class: "cl-spinner", "aria-hidden": "true" }), text);
  }

  chooser(label, key, options, value, onchange) {
    const select = h("select", { "data-key": key, onchange: (e) => onchange(e.target.value) },
      options.map(([id, text]) => h("option", { value: id, selected: String(id) === String(value) }, text)));
    return h("label", { class: `cl-choose-${key}` }, h("span", {}, label), select);
  }

  drawControls() {
    const grids = this.get("grids");
    const state = JSON.stringify([
      Object.keys(grids), ...["method", "language", "example"].map((n) => this.get(n)),
      Boolean(this.answers.of(this.key("sample"))), this.answers.of(this.key("scores"))?.error,
    ]);
    // An open list would close if it were made anew at every answer.
    if (state === this.controlsState) return;
    this.controlsState = state;
    const { cheap, languages, computes } = this.facts;
    const methods = [...Object.keys(grids), ...cheap.filter((m) => !(m in grids))];
    const parts = [
      this.chooser("scores", "method",
        methods.map((m) => [m, m in grids ? m : `${m} (compute)`]), this.get("method"),
        (method) => this.set({ method })),
    ];
    const sample = this.answers.of(this.key("sample"));
    // The same number is the same sentence in parallel languages, if both samples are as large.
    if (sample?.ok && this.get("example") >= sample.examples.length) this.set({ example: 0 });
    const example = [];
    if (computes) {
      parts.push(this.chooser("language", "language", languages.map((l) => [l, l]),
        this.get("language"), (language) => this.set({ language })));
      const mark = (e) => (e.gold === e.predicted ? "✓" : "✗");
      const options = sample?.ok
        ? sample.examples.map((e, i) => [i, `${mark(e)} ${i + 1}. ${cut(e.text, 90)}`]) : [];
      parts.push(this.chooser("example", "example", options, this.get("example"),
        (i) => this.set({ example: Number(i) })));
      const chosen = sample?.ok ? sample.examples[this.get("example")] : null;
      if (chosen) {
        const right = chosen.gold === chosen.predicted;
        example.push(h("p", { class: "cl-text", "data-scroll": "text" }, chosen.text),
          h("p", { class: "cl-quiet" }, `${right ? "✓ right" : "✗ wrong"}: the model says ${chosen.predicted}` +
            `${right ? "" : `, the label is ${chosen.gold}`} (held-out example ${chosen.id})`));
      }
      if (sample?.ok === false) example.push(this.problem(this.key("sample"), sample));
    }
    const scored = this.answers.of(this.key("scores"));
    if (scored?.ok === false) example.push(this.problem(this.key("scores"), scored));
    example.push(...this.facts.notes.map((note) => h("p", { class: "cl-quiet" }, `Note: ${note}`)));
    refill(this.box.controls, parts);
    refill(this.box.example, example);
  }

  about(head) {
    const grid = this.get("grids")[this.get("method")];
    const [layer, index] = placeOf(head);
    const member = this.get("members").includes(head) ? ", in the circuit" : "";
    if (!grid) return { member, text: `${head}${member}: not scored yet` };
    const value = (name) => grid[name][layer][index];
    const interval = [grid.low?.[layer][index], grid.high?.[layer][index]];
    const total = this.facts.n_layers * this.facts.n_heads;
    const rank = `rank ${value("rank")} of ${total}`;
    return {
      member, grid, mean: value("mean"), interval, rank,
      text: `${head}${member}: relevance ${num(value("mean"), 4)}` +
        `${grid.low ? ` (95 % interval ${range(interval, 4)})` : ""}, ${rank}`,
    };
  }
}

export default {
  render({ model, el }) {
    const view = new View(model, el);
    return () => view.close();
  },
};
