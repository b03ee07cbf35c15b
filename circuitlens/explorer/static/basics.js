// The explorer's view, one ES module in several files that Python joins (see widget.py), this one
// first and explorer.js last. All text comes in by textContent and attributes, never as HTML: tokens and
// examples are data. What is shown follows from the model's traits and from the answers so far;
// `lacking` says which answer the present state lacks, and one question at a time is asked. So a
// click changes the state at once, and only the newest state is computed.

const COMPARED = 3;
const KEPT_ANSWERS = 80;
const PATIENCE = 15000; // ms without an answer until the view says that it waits

// -- small things ------------------------------------------------------------------------------

function fill(node, props, children) {
  for (const [name, value] of Object.entries(props)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat().filter((c) => c !== null && c !== undefined));
  return node;
}
const h = (tag, props = {}, ...children) => fill(document.createElement(tag), props, children);
const s = (tag, props = {}, ...children) =>
  fill(document.createElementNS("http://www.w3.org/2000/svg", tag), props, children);

const minus = (text) => text.replace("-", "−");
function num(x, digits = 3) {
  if (x === null || x === undefined || Number.isNaN(x)) return "–";
  return minus(x !== 0 && Math.abs(x) < 10 ** -digits ? x.toExponential(1) : x.toFixed(digits));
}
const signed = (x, digits = 3) => (x > 0 ? "+" : "") + num(x, digits);
const percent = (x) => `${(100 * x).toFixed(1)} %`;
const points = (x) => `${x > 0 ? "+" : ""}${minus((100 * x).toFixed(1))} points`;
const range = ([low, high], digits = 3) => `${num(low, digits)} to ${num(high, digits)}`;
const blanks = (token) => token.replaceAll(" ", "·").replaceAll("\n", "⏎").replaceAll("\t", "⇥");
const cut = (text, n) => (text.length > n ? `${text.slice(0, n - 1)}…` : text);
const nameOf = (layer, index) => `a${layer}.h${index}`;
const placeOf = (name) => name.match(/\d+/g).map(Number);

const rgb = (hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
/** Colour between the stops of a scale, at t from 0 to 1. */
function mix(stops, t) {
  const at = Math.min(1, Math.max(0, t));
  let i = 1;
  while (i < stops.length - 1 && stops[i][0] < at) i++;
  const [a, b] = [stops[i - 1], stops[i]];
  const [from, to, share] = [rgb(a[1]), rgb(b[1]), (at - a[0]) / (b[0] - a[0])];
  return from.map((x, k) => Math.round(x + share * (to[k] - x)));
}
const css = (colour) => `rgb(${colour.join(",")})`;
const light = ([r, g, b]) => 0.299 * r + 0.587 * g + 0.114 * b > 140;

/** Whether the notebook is dark; where it does not say, the browser does. */
function isDark(mode) {
  if (mode !== "auto") return mode === "dark";
  const { jpThemeLight, vscodeThemeKind } = document.body.dataset;
  if (jpThemeLight !== undefined) return jpThemeLight === "false";
  if (vscodeThemeKind !== undefined) return !vscodeThemeKind.includes("light");
  return window.matchMedia("(prefers-color-scheme: dark)").matches;
}

/** Put new content into a box; focus and scrolling stay where they were. */
function refill(box, ...children) {
  const focused = box.contains(document.activeElement) && document.activeElement.dataset.key;
  const scrolled = [...box.querySelectorAll("[data-scroll]")].map((n) => [
    n.dataset.scroll, n.scrollLeft, n.scrollTop,
  ]);
  box.replaceChildren(...children.flat().filter((c) => c !== null && c !== undefined));
  for (const [key, x, y] of scrolled) {
    const node = [...box.querySelectorAll("[data-scroll]")].find((n) => n.dataset.scroll === key);
    if (node) node.scrollTo(x, y);
  }
  if (focused) [...box.querySelectorAll("[data-key]")].find((n) => n.dataset.key === focused)?.focus();
}
