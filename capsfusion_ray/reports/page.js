"use strict";
const { figures: F, rows: ROWS } = JSON.parse(document.getElementById("data").textContent);
const SIDES = ["raw", "synthetic", "fused"];
const SHOWN_AT_ONCE = 40;
const $ = (id) => document.getElementById(id);
const number = (n) => n.toLocaleString("en");
const speedOf = (n) => number(n < 100 ? Number(n.toFixed(1)) : Math.round(n));
const share = (n) => (n === null || n === undefined ? "–" : (100 * n).toFixed(1) + "%");

// All data reaches the page through this function, as text nodes, so nothing in a caption can become markup.
function make(tag, attributes, ...children) {
  const svg = ["svg", "path", "line", "text", "rect"].includes(tag);
  const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) node.setAttribute(name, value);
  for (const child of children) node.append(child);
  return node;
}

// ---------------------------------------------------------------------------------------------------------- theme
function setTheme(theme) { document.documentElement.dataset.theme = theme; }
setTheme(matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
$("theme").addEventListener("click", () => setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark"));

// --------------------------------------------------------------------------------------------------------- totals
const OUTCOMES = Object.keys(F.counts).filter((name) => name !== "planned");
function status() {
  const done = OUTCOMES.reduce((sum, name) => sum + F.counts[name], 0);
  const said = (name, text) => (F.base[name] && F.base[name] !== "None" ? text(F.base[name]) : "");
  const by = [
    F.speed.updated_at.replace("T", " ").replace(/:\d\dZ$/, " UTC"), said("engine.kind", (v) => `engine ${v}`),
    said("decode.num_beams", (v) => (v === "1" ? "1 beam" : `${v} beams`)), said("decode.scoring", (v) => `scoring ${v}`), said("engine.dtype", (v) => v),
  ];
  const state = F.finished ? "finished" : `running: ${share(done / F.counts.planned)} of the rows are done`;
  $("status").append(make("b", { class: F.finished ? "" : "running" }, state), ...by.filter(Boolean).map((text) => ` · ${text}`));
}
function totals() {
  const done = OUTCOMES.reduce((sum, name) => sum + F.counts[name], 0);
  const bar = make("div", { class: "bar", role: "img", "aria-label": OUTCOMES.map((n) => `${n} ${F.counts[n]}`).join(", ") });
  const list = make("ul", { class: "outcomes" });
  for (const name of OUTCOMES) {
    if (!F.counts[name]) continue;
    bar.append(make("i", { style: `width:${(100 * F.counts[name]) / F.counts.planned}%;background:var(--${name})` }));
    list.append(make("li", {}, make("span", { class: "dot", style: `background:var(--${name})` }), `${name} `, make("b", {}, number(F.counts[name])), ` ${share(F.counts[name] / F.counts.planned)}`));
  }
  const sum = OUTCOMES.map((name) => `${number(F.counts[name])} ${name}`).join(" + ");
  const closes = done === F.counts.planned ? `All rows are accounted for: ${number(F.counts.planned)} planned = ${sum}.` : `${number(done)} of ${number(F.counts.planned)} planned rows are done (${share(done / F.counts.planned)}).`;
  $("totals").append(bar, list, make("p", { class: "closes" }, closes));
  for (const [path, error] of Object.entries(F.unreadable_shards)) $("totals").append(make("p", { class: "closes" }, `unreadable shard ${path}: ${error}`));
}

// ---------------------------------------------------------------------------------------------------------- cards
function card(title, ...children) { $("cards").append(make("div", { class: "card" }, make("h3", {}, title), ...children)); }
function meter(name, said, width, colour) {
  return make("div", { class: "meter" }, make("span", {}, name), make("span", {}, said), make("span", { class: "track" }, make("i", { style: `width:${100 * width}%;background:var(--${colour})` })));
}
function meters(values, total, colour) {  // relative to the largest value, because the shares of all rows would be a few pixels wide
  const most = Math.max(...Object.values(values));
  return Object.entries(values).sort((a, b) => b[1] - a[1]).map(([name, value]) => meter(name, `${number(value)} · ${share(value / total)}`, value / most, colour));
}
function key(names) {
  return make("div", { class: "key" }, ...names.map((name) => make("span", {}, make("span", { class: "dot", style: `background:var(--${name})` }), name)));
}
function lines(series, xLabel) {
  const [W, H, left, bottom] = [320, 150, 44, 20];
  const points = Object.values(series).flat();
  const xMax = Math.max(1, ...points.map((p) => p[0])), yMax = Math.max(0, ...points.map((p) => p[1])) || 1;
  const at = ([x, y]) => `${(left + (x / xMax) * (W - left - 4)).toFixed(1)},${(H - bottom - (y / yMax) * (H - bottom - 10)).toFixed(1)}`;
  const svg = make("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": xLabel });
  svg.append(make("line", { x1: left, y1: H - bottom, x2: W, y2: H - bottom, stroke: "var(--line)" }));
  svg.append(make("text", { x: left - 4, y: 14, "text-anchor": "end" }, number(yMax < 10 ? Number(yMax.toFixed(2)) : Math.round(yMax))));
  svg.append(make("text", { x: W, y: H - 5, "text-anchor": "end" }, `${number(Math.round(xMax))} ${xLabel}`));
  for (const [name, values] of Object.entries(series))
    if (values.length) svg.append(make("path", { d: "M" + values.map(at).join("L"), fill: "none", stroke: `var(--${name})`, "stroke-width": 2, "stroke-linejoin": "round" }));
  return svg;
}
function clock(s) { return s === null || s === undefined ? "–" : `${Math.floor(s / 3600)}:${String(Math.floor(s / 60) % 60).padStart(2, "0")}:${String(Math.round(s) % 60).padStart(2, "0")}`; }

function cards() {
  const kept = F.knowledge.fused;
  card("Knowledge kept", make("p", { class: "big" }, share(kept)),
    make("p", {}, "of the names and numbers in the raw captions are also in the fused captions. The bars compare all three captions."),
    ...[["raw", 1], ["fused", kept], ["synthetic", F.knowledge.synthetic]].map(([name, value]) => meter(name, share(value), value || 0, name)),
    make("p", {}, `Measured on a sample of ${number(F.measured)} rows.`));
  const origins = make("div", { class: "bar", role: "img", "aria-label": "fused words by origin" });
  for (const name of ["raw", "both", "synthetic", "neither"]) origins.append(make("i", { style: `width:${100 * F.origins[name]}%;background:var(--${name})` }));
  const said = { raw: "only the raw caption", both: "both captions", synthetic: "only the synthetic caption", neither: "neither: joining words, or invented" };
  card("Where the words of fused captions come from", origins, ...Object.entries(said).map(([name, text]) =>
    make("div", { class: "meter" }, make("span", {}, make("span", { class: "dot", style: `background:var(--${name})` }), text), make("span", {}, share(F.origins[name])))));
  const speed = F.speed;
  const cost = speed.usd_per_million !== null ? `$${speed.usd_per_million.toFixed(2)} per million captions at $${speed.usd_per_gpu_hour} per GPU hour` : speed.actor_hours_per_million !== null ? `${Number(speed.actor_hours_per_million.toPrecision(2))} actor hours per million captions` : "";
  card("Speed", make("p", { class: "big" }, `${speedOf(speed.captions_per_s)} ${speed.unit}`),
    speed.history.length > 1 ? lines({ fused: speed.history.map((h) => [h[0] / 60, h[2]]) }, "minutes") : make("p", {}, "The run is too short for a curve."),
    make("p", {}, [`${speed.actors} actor${speed.actors === 1 ? "" : "s"}`, ...Object.keys(speed.devices), F.finished ? "finished" : `${clock(speed.eta_s)} left`, cost].filter(Boolean).join(" · ")));
  const hours = Math.max(0, ...speed.eta_history.map((h) => h[1])) > 2 * 3600;
  if (speed.eta_history.length > 1)
    card(`Estimated ${hours ? "hours" : "minutes"} left, over time`, lines({ fused: speed.eta_history.map((h) => [h[0] / 60, h[1] / (hours ? 3600 : 60)]) }, "minutes"));
  const bars = Object.fromEntries(SIDES.map((side) => [side, F.lengths[side].bars.map((n, i) => [i * 3, n])]));
  card("Words per caption", lines(bars, "words"), key(SIDES), make("p", {}, SIDES.map((s) => `${s} ${F.lengths[s].mean} (95%: ${F.lengths[s].p95})`).join(" · ")));
  const last = (side) => (F.diversity[side].length ? F.diversity[side][F.diversity[side].length - 1][1] : 0);
  card("Distinct three-word phrases", lines(F.diversity, "captions"), key(SIDES), make("p", {}, SIDES.map((s) => `${s} ${number(last(s))}`).join(" · ")), make("p", {}, "A curve that flattens shows captions that repeat the same phrases."));
  if (Object.keys(F.reasons).length) card("Rejected, by reason", ...meters(F.reasons, F.counts.planned, "rejected"));
  if (Object.keys(F.flags).length) card("Flagged, in the dataset", ...meters(F.flags, F.counts.planned, "synthetic"));
  if (F.revisions.length > 1)
    card("Revisions", ...F.revisions.map((r) => make("div", { class: "meter" }, make("span", {}, r.kind || "base"), make("span", {}, r.rows === undefined ? "" : `${number(r.rows)} rows`))));
  if (Object.keys(F.filtered_by).length) card("Filtered out", ...meters(F.filtered_by, F.counts.planned, "filtered"));
}

// ----------------------------------------------------------------------------------------------------------- rows
let filter = "", wanted = "", shown = SHOWN_AT_ONCE;
function filters() {
  const counts = new Map();
  for (const row of ROWS) for (const name of row.strata) counts.set(name, (counts.get(name) || 0) + 1);
  const add = (name, label) => {
    const button = make("button", { type: "button", "aria-pressed": String(name === filter) }, label);
    button.addEventListener("click", () => {
      filter = name; shown = SHOWN_AT_ONCE;
      for (const other of $("filters").children) other.setAttribute("aria-pressed", String(other === button));
      list();
    });
    $("filters").append(button);
  };
  add("", `all ${number(ROWS.length)}`);
  for (const [name, n] of [...counts].sort((a, b) => b[1] - a[1])) add(name, `${name} ${number(n)}`);
}
function matches(row) {
  if (filter && !row.strata.includes(filter)) return false;
  if (!wanted) return true;
  const captions = [row, row.other].filter(Boolean).flatMap((r) => [r.fused.map((p) => p[0]).join(""), r.detail]);
  return [row.id, row.raw, row.synthetic, row.url, ...captions].some((text) => text.toLowerCase().includes(wanted));
}
function caption(row) {
  const source = (name, text) => make("p", { class: "source" }, make("span", { class: name }, name), make("span", { dir: "auto" }, text || "—"));
  const sources = [source("raw", row.raw), source("synthetic", row.synthetic)];
  if (!row.other) return make("article", {}, written(row), ...sources, tags(row, row.id));
  const side = (name, one) => make("div", {}, make("p", { class: "which" }, name), written(one), tags(one));
  return make("article", {}, make("div", { class: "pair" }, side("this output", row), side("the other output", row.other)), ...sources, tags({ flags: [] }, row.id));
}
function written(row) {
  const fused = make("p", { class: "fused", dir: "auto" });
  for (const [text, origin, changed] of row.fused) {
    const marks = [origin, changed ? "changed" : ""].filter(Boolean).join(" ");
    fused.append(marks ? make("span", { class: marks }, text) : text);
  }
  if (!row.fused.length) fused.append("—");
  return fused;
}
function tags(row, id) {
  const line = make("p", { class: "tags" });
  if (row.reason) line.append(make("span", { class: "tag reject" }, row.reason));
  for (const flag of row.flags) line.append(make("span", { class: "tag" }, flag));
  if (row.detail) line.append(make("span", {}, row.detail));
  if (id) line.append(make("span", {}, id));
  return line;
}
function list() {
  const found = ROWS.filter(matches);
  $("rows").replaceChildren(...found.slice(0, shown).map(caption));
  $("found").textContent = `${number(found.length)} of ${number(ROWS.length)} sampled rows`;
  $("more").hidden = found.length <= shown;
}
$("search").addEventListener("input", (event) => { wanted = event.target.value.trim().toLowerCase(); shown = SHOWN_AT_ONCE; list(); });
$("more").addEventListener("click", () => { shown += SHOWN_AT_ONCE; list(); });

// ------------------------------------------------------------------------------------------------------- settings
function settings() {
  for (const [name, value] of Object.entries(F.base)) $("base").append(make("dt", {}, name), make("dd", {}, value));
  $("prompt").textContent = F.prompt;
}
// ----------------------------------------------------------------------------------------------------- two outputs
function beside() {
  const B = F.beside;
  if (!B) return;
  $("beside").hidden = false;
  $("beside-path").textContent = B.path;
  const line = (name, a, b) => $("beside-figures").append(make("tr", a === b ? {} : { class: "differs" }, make("th", { scope: "row" }, name), make("td", {}, a), make("td", {}, b)));
  const rate = (of, kind, name) => (of.counts.planned ? share((of[kind][name] || 0) / of.counts.planned) : "–");
  $("beside-rows").textContent = `${number(B.different)} of ${number(B.compared)} compared captions differ (${share(B.different / B.compared)}).`;
  for (const name of OUTCOMES) if (F.counts[name] || B.counts[name]) line(name, rate(F, "counts", name), rate(B, "counts", name));
  for (const [kind, label] of [["reasons", "rejected"], ["flags", "flagged"]])
    for (const name of [...new Set([...Object.keys(F[kind]), ...Object.keys(B[kind])])].sort()) line(`${label}: ${name}`, rate(F, kind, name), rate(B, kind, name));
  line("knowledge kept", share(F.knowledge.fused), share(B.knowledge.fused));
  line("words from neither source", share(F.origins.neither), share(B.origins.neither));
  line("words per caption", String(F.lengths.fused.mean), String(B.lengths.fused.mean));
  line(F.speed.unit === B.speed.unit ? F.speed.unit : "captions/s", speedOf(F.speed.captions_per_s), speedOf(B.speed.captions_per_s));
  for (const name of [...new Set([...Object.keys(F.base), ...Object.keys(B.base)])].sort()) if (F.base[name] !== B.base[name]) line(name, F.base[name] || "–", B.base[name] || "–");
}

// ------------------------------------------------------------------------------------------------ against references
const MEASURES = {  // figure: its label and its format; the value of the reference captions is the one to come near to
  rouge_l: ["ROUGE-L", (n) => n.toFixed(3)], bleu_4: ["BLEU-4", (n) => n.toFixed(3)], chrf: ["chrF", (n) => n.toFixed(3)], cider: ["CIDEr", (n) => n.toFixed(2)],
  numbers_kept: ["numbers of the raw caption kept", share], capitalised_kept: ["capitalised words kept", share],
  content_in_neither: ["content words in neither source", share], numbers_in_neither: ["captions with a number in neither source", share],
  good_ending: ["ends as a sentence", share], repeated_trigram: ["repeats three words", share], near_concatenation: ["nearly a concatenation of its sources", share],
  pasted: ["the same, for captions of any length", share], instruction_echo: ["talks about the instruction", share], words: ["words per caption", (n) => n.toFixed(1)],
};
function evaluation() {
  const E = F.evaluation;
  if (!E) return;
  $("evaluation").hidden = false;
  const systems = [E.system, ...Object.keys(E.figures).filter((name) => name !== E.system)], mark = (name) => (name === E.system ? { class: "measured" } : {});
  $("evaluation-systems").append(...systems.map((name) => make("th", { scope: "col", ...mark(name) }, name)));
  for (const [figure, [label, said]] of Object.entries(MEASURES))
    $("evaluation-figures").append(make("tr", {}, make("th", { scope: "row" }, label), ...systems.map((name) => make("td", mark(name), figure in E.figures[name] ? said(E.figures[name][figure]) : "–"))));
  $("evaluation-rows").textContent = `${number(E.rows)} pairs; the ${E.system} is ${E.measured}. The extractive oracle consists of the words of both sources that the reference contains, too: about as near to the reference as a system can get that only leaves words out.`;
}
status(); totals(); beside(); evaluation(); cards(); filters(); list(); settings();
