// -- the panel: what is known of the selected heads --------------------------------------------

class Panel {
  constructor(view, box) {
    Object.assign(this, { view, box, matrices: new Map() });
  }

  draw() {
    const heads = this.view.get("selected");
    refill(this.box, heads.length
      ? heads.map((head) => this.card(head))
      : h("p", { class: "cl-quiet" }, "Click a head to look at it; Shift-click adds others to compare."));
  }

  card(head) {
    const { mean, interval, rank, member, grid } = this.view.about(head);
    const inside = member !== "";
    const parts = [
      h("div", { class: "cl-cardhead" }, h("h3", {}, head),
        h("span", { class: "cl-badge" }, inside ? "in the circuit" : "not in the circuit"),
        h("button", { type: "button", class: "cl-toggle", "data-key": `toggle ${head}`,
          onclick: () => this.view.toggle(head),
        }, inside ? `remove ${head} from the circuit` : `add ${head} to the circuit`)),
      grid ? h("p", {}, "Relevance ", h("b", {}, num(mean, 4)), ` (95 % interval ${range(interval, 4)}), ${rank} by `,
        this.view.get("method"), ".") : h("p", { class: "cl-quiet" }, "Not scored yet."),
    ];
    if (!this.view.facts.computes) {
      parts.push(h("p", { class: "cl-quiet" },
        "The attention pattern, direct logit attribution and the effect of ablation need the model: " +
        "explore(model, task, baseline, scores=…)."));
      return h("section", { class: "cl-card", "aria-label": `head ${head}` }, parts);
    }
    parts.push(this.section("Mean ablation of this head alone", "effect", head, (a) => this.effect(a)));
    parts.push(this.section("Direct logit attribution", "look", head, (a) => this.attribution(a)));
    parts.push(this.section("Attention", "look", head, (a) => this.matrixOf(a, head)));
    return h("section", { class: "cl-card", "aria-label": `head ${head}` }, parts);
  }

  section(title, kind, head, show) {
    const key = this.view.key(kind, head);
    const answer = this.view.answers.of(key);
    const stuck = this.view.answers.of(this.view.key("sample"))?.ok === false;
    const body = answer ? (answer.ok ? show(answer) : this.view.problem(key, answer))
      : stuck ? h("p", { class: "cl-quiet" }, "There are no examples to compute it on.")
        : this.view.waiting("computing…");
    return h("div", { class: "cl-section" }, h("h4", {}, title), body);
  }

  effect(a) {
    const change = a.ablated_margin - a.margin;
    return [
      h("p", {}, "Accuracy ", percent(a.accuracy), " → ", h("b", {}, percent(a.ablated_accuracy)),
        ` (${points(a.ablated_accuracy - a.accuracy)})`),
      h("p", {}, `Margin ${num(a.margin)} → `, h("b", {}, num(a.ablated_margin)),
        ` (${signed(change)}; 95 % interval ${range(a.interval)})`),
      h("p", { class: "cl-quiet" }, `A sample: n = ${a.n} held-out examples in ${this.view.get("language")}.`),
    ];
  }

  attribution(a) {
    const most = Math.max(...Object.values(a.labels).map(Math.abs), 1e-9);
    const bar = (value) => {
      const width = `${(50 * Math.abs(value)) / most}%`;
      const node = h("span", { class: "cl-dla" }, h("i"));
      Object.assign(node.firstChild.style, {
        width, left: value < 0 ? `calc(50% - ${width})` : "50%",
        background: this.view.look.diverging.at(value < 0 ? 0 : -1)[1],
      });
      return node;
    };
    const row = ([text, value]) => h("tr", {}, h("th", { scope: "row" }, cut(blanks(text), 24)),
      h("td", {}, signed(value)));
    const list = (title, rows) => h("table", { class: "cl-tokens" }, h("caption", {}, title), rows.map(row));
    return [
      h("p", { class: "cl-quiet" }, "What the head's output at the decision position, less its mean, adds to " +
        "the logits on this example by W_O, the final norm with its scale frozen, and the unembedding " +
        "alone, not by way of later heads and MLPs."),
      h("table", { class: "cl-labels" }, Object.entries(a.labels).map(([label, value]) =>
        h("tr", {}, h("th", { scope: "row" }, label), h("td", {}, bar(value)), h("td", {}, signed(value))))),
      h("div", { class: "cl-two" }, list("most promoted tokens", a.promoted), list("most suppressed", a.suppressed)),
    ];
  }

  /** The same nodes while nothing changes, so that drawing the panel anew costs nothing. */
  matrixOf(a, head) {
    const key = `${this.view.key("look", head)}|${this.view.root.dataset.theme}`;
    const nodes = this.matrices.get(key) ?? this.attention(a, head);
    this.matrices.delete(key);
    this.matrices.set(key, nodes);
    if (this.matrices.size > COMPARED) this.matrices.delete(this.matrices.keys().next().value);
    return nodes;
  }

  attention(a, head) {
    const [n, weights, tokens] = [a.tokens.length, a.data[0], a.tokens.map(blanks)];
    const at = (query, key) => weights[query * n + key];
    const what = (i) => `‘${tokens[i]}’ (${i})${i === a.decision ? ", the decision position," : ""}`;
    const shade = (weight) => mix(this.view.look.sequential, Math.sqrt(weight));
    const strip = h("p", { class: "cl-strip" });
    const most = h("p", { class: "cl-quiet" });
    const showQuery = (query) => {
      const order = [...Array(n).keys()].sort((i, j) => at(query, j) - at(query, i)).slice(0, 5);
      most.textContent = `From ${what(query)} most to ` +
        `${order.map((i) => `‘${tokens[i]}’ (${i}) ${at(query, i).toFixed(2)}`).join(", ")}.`;
      strip.replaceChildren(...tokens.map((token, i) => {
        const colour = shade(at(query, i));
        const span = h("span", { title: `${i}: ${at(query, i).toFixed(3)}`, dir: "auto", class: i === query ? "cl-query" : "" }, token);
        span.style.background = css(colour);
        span.style.color = light(colour) ? "#111" : "#fff";
        return span;
      }));
    };
    showQuery(a.decision);
    const readout = h("p", { class: "cl-readout" }, "Hover over the matrix for weights; click a row to read from its token.");
    const size = n <= 28 ? 15 : n <= 130 ? 12 : Math.max(2, Math.floor(1560 / n));
    const labelled = size >= 10;
    const margin = labelled ? 84 : 0;
    const scale = n * size * window.devicePixelRatio > 4096 ? 1 : window.devicePixelRatio;
    const canvas = (width, height, cls, paint) => {
      const node = h("canvas", { width: width * scale, height: height * scale, class: cls });
      Object.assign(node.style, { width: `${width}px`, height: `${height}px` });
      const pen = node.getContext("2d");
      pen.scale(scale, scale);
      pen.font = "11px Helvetica, Arial, sans-serif";
      pen.fillStyle = this.view.look.ink;
      paint(pen);
      return node;
    };
    const short = (i) => cut(tokens[i], 13);
    const matrix = canvas(n * size, n * size, "cl-matrix", (pen) => {
      for (let query = 0; query < n; query++) {
        for (let key = 0; key < n; key++) {
          pen.fillStyle = css(shade(at(query, key)));
          pen.fillRect(key * size, query * size, size - (size > 6), size - (size > 6));
        }
      }
    });
    matrix.setAttribute("role", "img");
    matrix.setAttribute("aria-label", `Attention pattern of ${head}, ${n} × ${n} tokens`);
    const cell = (event) => [event.offsetY, event.offsetX].map((v) => Math.min(n - 1, Math.max(0, Math.floor(v / size))));
    matrix.addEventListener("pointermove", (event) => {
      const [query, key] = cell(event);
      readout.textContent = `From ${what(query)} to ‘${tokens[key]}’ (${key}): ${at(query, key).toFixed(4)}`;
    });
    matrix.addEventListener("click", (event) => {
      showQuery(cell(event)[0]);
    });
    const side = (cls, upright) => canvas(upright ? n * size : margin, upright ? margin : n * size, cls, (pen) => {
      for (let i = 0; i < n; i++) {
        pen.save();
        if (upright) {
          pen.translate((i + 0.5) * size + 4, margin - 3);
          pen.rotate(-Math.PI / 2);
        } else {
          pen.translate(margin - 4, (i + 0.5) * size + 4);
          pen.textAlign = "right";
        }
        pen.fillText(short(i), 0, 0, margin - 6);
        pen.restore();
      }
    });
    return [
      most, strip, readout,
      h("div", { class: labelled ? "cl-attention" : "cl-attention cl-bare", tabindex: 0, "data-scroll": `attention ${head}`,
        "aria-label": "attention matrix, scrolls" },
      labelled ? [h("span", { class: "cl-corner" }, "from ↓ to →"), side("cl-top", true), side("cl-side", false)] : [],
      matrix),
      h("p", { class: "cl-quiet" }, "Shade: square root of the weight, so that small ones can be seen. · is a blank."),
    ];
  }
}
