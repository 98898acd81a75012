"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const rows = data.after.rows;
const earlier = new Map((data.before ? data.before.rows : []).map(row => [key(row), row]));
const layout = { margin: { l: 60, r: 20, t: 24, b: 44 }, paper_bgcolor: "white", plot_bgcolor: "white", hovermode: "closest", font: { size: 11 }, uirevision: "kept" };
const options = { responsive: true, displaylogo: false, scrollZoom: true };
// Of dB: red where noise is a tenth of the power, green from where it hardly shows.
const SCALE = [[0, "#a31515"], [0.15, "#e2711d"], [0.35, "#f2d04b"], [0.6, "#7fbf5f"], [1, "#1a7a4a"]];
const RANGE = [5, 45];
const COLORS = { input: "#1f77b4", weight: "#e07b00", other: "#2a9d4a" };
let chosen = 0;

function key(row) { return row.node + " " + row.operand; }
function number(value, digits) { return value === null || value === undefined ? "" : value.toFixed(digits); }
function brief(value) { return value === null || value === undefined ? "" : Number(value.toPrecision(4)).toString(); }
function si(count) {
  for (const [unit, size] of [["G", 1e9], ["M", 1e6], ["k", 1e3]]) if (count >= size) return (count / size).toFixed(2) + " " + unit;
  return String(count);
}
function sqnr(row) { return row.exact ? "exact" : number(row.sqnr, 1); }
function element(tag, text, className) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

// Heading, text of a cell, value to sort by, whether it is a word.
const columns = [
  ["node", row => row.node, row => row.node, true],
  ["operand", row => row.operand, row => row.operand, true],
  ["format", row => row.reason ? "float: " + row.reason : row.format, row => row.bits === null ? 32 : row.bits, true],
  ["SQNR dB", sqnr, row => row.exact ? Infinity : row.sqnr],
  ...(data.before ? [["before", row => earlier.has(key(row)) ? sqnr(earlier.get(key(row))) : "", row => earlier.has(key(row)) ? earlier.get(key(row)).sqnr : null]] : []),
  ["clipped %", row => row.clipped === null ? "" : number(100 * row.clipped, 2), row => row.clipped],
  ["clip", row => brief(row.clip), row => row.clip],
  ["max|x|", row => brief(row.max_abs), row => row.max_abs],
  ["gain dB", row => number(row.gain, 2), row => row.gain],
  ["zeros %", row => row.zeros === null ? "" : number(100 * row.zeros, 1), row => row.zeros],
  ["MACs %", row => number(100 * row.share, 2), row => row.share],
  ["op", row => row.op, row => row.op, true],
  ["shape", row => row.shape.join("x"), row => row.shape.reduce((a, b) => a * b, 1)],
  ["scale per", row => row.granularity || "", row => row.granularity, true],
];

function makeTable() {
  const head = document.createElement("tr");
  columns.forEach(([name, , value, word], i) => {
    const cell = element("th", name, word ? "word" : "");
    cell.addEventListener("click", () => sortBy(i));
    head.append(cell);
  });
  document.querySelector("#table thead").append(head);
  const body = document.querySelector("#table tbody");
  rows.forEach((row, i) => {
    const line = document.createElement("tr");
    line.dataset.row = i;
    for (const [name, text, , word] of columns) {
      const bad = name === "SQNR dB" && row.sqnr !== null && (row.sqnr < 10 ? "bad" : row.sqnr < 15 ? "poor" : "");
      line.append(element("td", text(row), [word ? "word" : "", bad || ""].join(" ").trim()));
    }
    if (row.reason) { line.title = row.reason; line.children[2].className = "reason"; }
    line.addEventListener("click", () => choose(i));
    body.append(line);
  });
  document.getElementById("filter").addEventListener("input", filter);
  filter();
}
function sortBy(column) {
  const cell = document.querySelectorAll("#table th")[column];
  const order = cell.dataset.order === "1" ? -1 : 1;
  document.querySelectorAll("#table th").forEach(other => delete other.dataset.order);
  cell.dataset.order = order;
  const value = columns[column][2];
  const body = document.querySelector("#table tbody");
  const lines = [...body.children];
  lines.sort((a, b) => {
    const [one, two] = [value(rows[a.dataset.row]), value(rows[b.dataset.row])];
    const missing = (one === null || one === undefined) - (two === null || two === undefined);
    return missing || order * (one < two ? -1 : one > two ? 1 : 0) || a.dataset.row - b.dataset.row;
  });
  body.append(...lines);
}
function filter() {
  const words = document.getElementById("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
  let shown = 0;
  for (const line of document.querySelectorAll("#table tbody tr")) {
    const text = line.textContent.toLowerCase();
    line.hidden = !words.every(word => text.includes(word));
    shown += !line.hidden;
  }
  document.getElementById("count").textContent = shown + " of " + rows.length + " operands";
}

function bars(detail, name, color) {
  const size = (detail.high - detail.low) / detail.counts.length;
  const total = detail.counts.reduce((a, b) => a + b, 0) || 1;
  return { type: "bar", name, x: detail.counts.map((_, i) => detail.low + (i + 0.5) * size), y: detail.counts.map(count => count / total), width: size, marker: { color }, opacity: 0.65, hovertemplate: "%{x:.4g}: %{y:.3%}<extra></extra>" };
}
function choose(i) {
  chosen = i;
  const row = rows[i], detail = row.detail, before = earlier.get(key(row));
  document.querySelectorAll("#table tr.chosen").forEach(line => line.classList.remove("chosen"));
  const line = document.querySelector(`#table tr[data-row="${i}"]`);
  line.classList.add("chosen");
  document.getElementById("chosen").textContent = `${row.node} ${row.operand}: ${row.format}` + (row.reason ? ", " + row.reason : "");
  const scale = document.getElementById("log").checked ? "log" : "linear";
  const traces = [], shapes = [];
  if (detail) {
    traces.push(bars(detail, data.before ? "after" : "values", "#1f77b4"));
    if (before && before.detail) traces.push(bars(before.detail, "before", "#b8c4d0"));
    const line = (x, color, width, dash) => shapes.push({ type: "line", x0: x, x1: x, yref: "paper", y0: 0, y1: 1, line: { color, width, dash } });
    detail.levels.forEach(level => line(level, "rgba(42,157,74,0.55)", 1));
    line(detail.clip, "#b3261e", 2, "dash");
    if (row.signed) line(-detail.clip, "#b3261e", 2, "dash");
  }
  const text = detail ? `${detail.unit}; red: clip ${brief(row.clip)}, green: ${detail.levels.length > 2 ? "levels" : "least and greatest level"}` : "nothing was measured";
  Plotly.react("histogram", traces, { ...layout, height: 320, barmode: "overlay", bargap: 0, shapes, showlegend: traces.length > 1, xaxis: { title: { text } }, yaxis: { type: scale, title: { text: "share of the values" } } }, options);
  const curve = (found, name, color) => ({ type: "scatter", mode: "lines+markers", name, x: data.after.bits, y: data.after.bits.map(bits => found.predicted[bits]), line: { color } });
  const curves = detail ? [curve(detail, data.before ? "after" : "predicted", "#1f77b4")] : [];
  if (before && before.detail) curves.push(curve(before.detail, "before", "#b8c4d0"));
  if (row.bits !== null && row.sqnr !== null) curves.push({ type: "scatter", mode: "markers", name: "measured", x: [row.bits], y: [row.sqnr], marker: { color: "#b3261e", size: 11, symbol: "x" } });
  Plotly.react("predicted", curves, { ...layout, height: 260, xaxis: { title: { text: "bits" }, dtick: 1 }, yaxis: { title: { text: "SQNR dB" } } }, options);
}

function onClick(id, rowOf) {
  document.getElementById(id).on("plotly_click", event => {
    const i = rowOf(event.points[0]);
    if (i === undefined || i < 0) return;
    choose(i);
    document.querySelector(`#table tr[data-row="${i}"]`).scrollIntoView({ block: "center" });
  });
}
function profile() {
  const kinds = [...new Set(rows.map(row => row.operand || "node"))];
  const traces = [];
  for (const kind of kinds) {
    const own = rows.map((row, i) => [row, i]).filter(([row]) => (row.operand || "node") === kind);
    const color = COLORS[kind] || COLORS.other;
    const shared = { type: "scatter", mode: "lines+markers", customdata: own.map(([, i]) => i), x: own.map(([, i]) => i), text: own.map(([row]) => `${row.node} ${row.operand} ${row.format}`), legendgroup: kind, hovertemplate: "%{text}<br>%{y:.3g}<extra></extra>", connectgaps: false };
    traces.push({ ...shared, name: kind, y: own.map(([row]) => row.sqnr), line: { color, width: 1 }, marker: { size: 6 } });
    if (data.before) traces.push({ ...shared, name: kind + ", before", mode: "markers", y: own.map(([row]) => (earlier.get(key(row)) || {}).sqnr), marker: { color, symbol: "circle-open", size: 7 } });
    traces.push({ ...shared, name: kind, showlegend: false, yaxis: "y2", y: own.map(([row]) => row.clipped === null ? null : 100 * row.clipped), line: { color, width: 1 }, marker: { size: 5 } });
    traces.push({ ...shared, name: kind, showlegend: false, yaxis: "y3", mode: "markers", y: own.map(([row]) => row.bits), marker: { color, symbol: "square", size: 5 } });
  }
  Plotly.newPlot("profile", traces, { ...layout, height: 560, xaxis: { title: { text: "operand, in the order of the graph" }, anchor: "y3" }, yaxis: { title: { text: "SQNR dB" }, domain: [0.46, 1] }, yaxis2: { title: { text: "clipped %" }, domain: [0.2, 0.42] }, yaxis3: { title: { text: "bits" }, domain: [0, 0.15], dtick: 2 } }, options);
  onClick("profile", point => point.customdata);
}
function heat() {
  const own = rows.map((row, i) => [row, i]).filter(([row]) => row.detail);
  const z = data.after.bits.map(bits => own.map(([row]) => row.detail.predicted[bits]));
  Plotly.newPlot("heat", [{ type: "heatmap", x: own.map(([, i]) => i), y: data.after.bits, z, zmin: RANGE[0], zmax: RANGE[1], colorscale: SCALE, colorbar: { title: { text: "dB" } }, text: data.after.bits.map(() => own.map(([row]) => `${row.node} ${row.operand}`)), hovertemplate: "%{text}<br>%{y} bits: %{z:.1f} dB<extra></extra>" }, { type: "scatter", mode: "markers", x: own.map(([, i]) => i), y: own.map(([row]) => row.bits), marker: { color: "black", size: 4 }, hoverinfo: "skip" }], { ...layout, height: 300, showlegend: false, xaxis: { title: { text: "operand; black: its bits" } }, yaxis: { title: { text: "bits" }, dtick: 1 } }, options);
  onClick("heat", point => point.x);
}
function drawing() {
  const { nodes, edges } = data.after.graph;
  const byNode = new Map();
  rows.forEach((row, i) => byNode.set(row.node, [...(byNode.get(row.node) || []), i]));
  const worst = node => (byNode.get(node.node) || []).map(i => rows[i].sqnr).filter(value => value !== null).reduce((a, b) => Math.min(a, b), Infinity);
  const lines = { x: [], y: [] };
  for (const [from, to] of edges) { lines.x.push(nodes[from].x, nodes[to].x, null); lines.y.push(nodes[from].y, nodes[to].y, null); }
  const is = node => byNode.has(node.node);
  const keeps = node => is(node) && byNode.get(node.node).some(i => rows[i].bits === null);
  const text = node => `${node.node}<br>${node.op}` + (byNode.get(node.node) || []).map(i => `<br>${rows[i].operand} ${rows[i].format} ${sqnr(rows[i])} dB`).join("");
  const marked = (chosen, marker) => ({ type: "scatter", mode: "markers", x: chosen.map(n => n.x), y: chosen.map(n => n.y), text: chosen.map(text), customdata: chosen.map(n => is(n) ? byNode.get(n.node)[0] : -1), hovertemplate: "%{text}<extra></extra>", marker });
  const own = nodes.filter(node => is(node) && !keeps(node));
  const traces = [
    { type: "scatter", mode: "lines", ...lines, line: { color: "#c3ccd6", width: 1 }, hoverinfo: "skip" },
    marked(nodes.filter(node => !is(node)), { color: "#dfe5ec", size: 7, line: { color: "#9aa7b5", width: 1 } }),
    marked(nodes.filter(keeps), { color: "#7a3b9a", size: 13, symbol: "square" }),
    marked(own, { size: 13, color: own.map(n => Math.min(worst(n), RANGE[1])), cmin: RANGE[0], cmax: RANGE[1], colorscale: SCALE, showscale: true, colorbar: { title: { text: "dB" } }, line: { color: "#46525f", width: 1 } }),
  ];
  Plotly.newPlot("drawing", traces, { ...layout, height: 420, showlegend: false, dragmode: "pan", xaxis: { title: { text: "depth" }, zeroline: false, showgrid: false }, yaxis: { visible: false, range: [Math.min(...nodes.map(n => n.y), 0) - 1.5, Math.max(...nodes.map(n => n.y), 0) + 1.5] } }, options);
  onClick("drawing", point => point.customdata);
}
function costs() {
  const blocks = [...new Set(rows.map(row => row.block))];
  const sum = (block, field) => rows.filter(row => row.block === block).reduce((total, row) => total + (row[field] || 0), 0);
  const macs = block => { const seen = new Map(rows.filter(row => row.block === block).map(row => [row.node, row.macs])); return [...seen.values()].reduce((a, b) => a + b, 0); };
  Plotly.newPlot("costs", [
    { type: "bar", name: "weights in float", x: blocks, y: blocks.map(block => sum(block, "float_bytes")), marker: { color: "#b8c4d0" } },
    { type: "bar", name: "weights as codes", x: blocks, y: blocks.map(block => sum(block, "bytes")), marker: { color: "#e07b00" } },
    { type: "bar", name: "MACs", x: blocks, y: blocks.map(macs), yaxis: "y2", marker: { color: "#1f77b4" } },
  ], { ...layout, height: 460, barmode: "group", xaxis: { anchor: "y2", type: "category", automargin: true }, yaxis: { title: { text: "bytes" }, domain: [0.54, 1] }, yaxis2: { title: { text: "MACs" }, domain: [0, 0.46] } }, options);
}
function summary() {
  const { quantized_macs, total_macs, skipped, notes, config } = data.after;
  const bytes = field => rows.reduce((total, row) => total + (row[field] || 0), 0);
  const share = total_macs ? (100 * quantized_macs / total_macs).toFixed(2) : "0";
  document.getElementById("summary").textContent = `${share}% of ${si(total_macs)} multiply-accumulates are quantized; weights ${si(bytes("bytes"))}B, ${si(bytes("float_bytes"))}B in float. ${rows.length} operands, clip ${config.clip || ""}. octav_fx ${data.version}.`;
  const place = document.getElementById("skipped");
  if (!skipped.length) place.append(element("p", "Nothing: every operand of every matmul and convolution is quantized."));
  else {
    const table = document.createElement("table");
    table.append(...[["node", "MACs", "reason"], ...skipped.map(each => [each.node, si(each.macs), each.reason])].map(cells => {
      const line = document.createElement("tr");
      line.append(...cells.map(cell => element("td", cell, "word")));
      return line;
    }));
    place.append(table);
  }
  notes.forEach(note => document.getElementById("notes").append(element("p", note)));
}

summary();
makeTable();
profile();
heat();
drawing();
costs();
document.getElementById("log").addEventListener("change", () => choose(chosen));
// The operand with the largest error is the one to look at first.
if (rows.length) choose(rows.reduce((least, row, i) => row.sqnr !== null && (rows[least].sqnr === null || row.sqnr < rows[least].sqnr) ? i : least, 0));
document.body.dataset.ready = "yes";
