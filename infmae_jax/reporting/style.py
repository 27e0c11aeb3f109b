"""Style sheet and script of the report. The script only shows values under the pointer; without it all is there."""

CSS = """
:root { color-scheme: light dark;
  --page: #f6f7f9; --card: #fff; --ink: #1c2430; --soft: #5c6878; --rule: #dde2e9; --line: #a33b12; --raw: #e5b79f;
  --restart: #2f6fb5; --skip: #c07a00; --rollback: #c2283a; --damage: #8447b5; --good: #1f8a4c; --changed: #fdf1d8; }
@media (prefers-color-scheme: dark) { :root {
  --page: #12161c; --card: #1b212a; --ink: #e7ebf1; --soft: #9aa6b6; --rule: #323b48; --line: #ff9a66; --raw: #7a4a33;
  --restart: #74b0f2; --skip: #f0b445; --rollback: #ff7081; --damage: #c79af0; --good: #57c98a; --changed: #3d3420; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 20px 16px 48px; }
h1 { font-size: 1.7rem; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 0 0 10px; }
p { margin: 4px 0; }
section, .facts, .problems { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; padding: 16px;
  margin: 14px 0; }
header p { color: var(--soft); overflow-wrap: anywhere; }
progress { width: 100%; height: 8px; accent-color: var(--good); }
.status { color: var(--card); background: var(--soft); border-radius: 99px; padding: 2px 10px; font-weight: 600; }
.status.finished { background: var(--good); } .status.running, .status.new { background: var(--restart); }
.status.stopped, .status.silent { background: var(--rollback); }
.status.preempted, .status.interrupted { background: var(--skip); }
.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: 14px; }
.facts div { min-width: 0; } dt { color: var(--soft); font-size: 0.85rem; } dd { margin: 0; font-weight: 600;
  overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
.problems { color: var(--rollback); padding-left: 34px; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); gap: 8px 20px; }
.chart { margin: 0; min-width: 0; } .chart svg { width: 100%; height: auto; display: block; touch-action: pan-y; }
figcaption { display: flex; justify-content: space-between; gap: 10px; }
output { color: var(--soft); font-variant-numeric: tabular-nums; white-space: nowrap; }
svg text { fill: var(--soft); font-size: 12px; } text.y { text-anchor: end; } text.x { text-anchor: middle; }
.grid { stroke: var(--rule); } .line, .raw { fill: none; stroke: var(--line); stroke-width: 2; stroke-linejoin: round;
  stroke-linecap: round; } .raw { stroke: var(--raw); stroke-width: 1.2; }
.cross path { stroke: var(--soft); } .cross circle { fill: var(--line); stroke: var(--card); stroke-width: 1.5; }
.mark { fill: currentColor; } .mark .rule { stroke: currentColor; stroke-dasharray: 3 3; opacity: 0.6; }
.restart { color: var(--restart); } .skip { color: var(--skip); } .rollback { color: var(--rollback); }
.damage { color: var(--damage); }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: 4px 16px; margin: 0 0 10px; padding: 0; }
.legend svg { width: 14px; height: 14px; vertical-align: -2px; margin-right: 5px; }
.legend i { display: inline-block; width: 11px; height: 11px; border-radius: 2px; margin-right: 6px;
  background: currentColor; }
.bar { width: 100%; height: 24px; display: block; border-radius: 5px; margin-bottom: 8px; fill: currentColor; }
.s0 { color: #2a9d5c; } .s1 { color: #e08a1e; } .s2 { color: #8a5fd0; } .s3 { color: #3f7fd1; } .s4 { color: #19a5a5; }
.s5 { color: #c94f8c; } .s6 { color: #8f99a6; }
.wide { overflow-x: auto; } .tall { overflow-y: auto; max-height: 70vh; }
table { border-collapse: collapse; width: 100%; font-size: 0.9rem; }
th, td { text-align: left; vertical-align: top; padding: 4px 12px 4px 0; border-bottom: 1px solid var(--rule);
  overflow-wrap: anywhere; } th { color: var(--soft); font-weight: 500; } td { font-variant-numeric: tabular-nums; }
.events td:nth-child(-n+3) { white-space: nowrap; } .events td { color: var(--ink); }
.events td:nth-child(3) { color: inherit; font-weight: 600; }
tr.changed td { background: var(--changed); } code { font-size: 0.85em; }
details { margin-top: 6px; } summary { cursor: pointer; } summary h2 { display: inline; } img { max-width: 100%;
  height: auto; border-radius: 4px; } footer { color: var(--soft); font-size: 0.85rem; }
@media (max-width: 560px) { svg text { font-size: 16px; } section, .facts { padding: 12px; }
  .facts { grid-template-columns: repeat(2, 1fr); } .wide img { max-width: none; width: 860px; }
  .events thead { display: none; } .events tr { display: grid; grid-template-columns: auto auto 1fr; }
  .events td:nth-child(-n+3) { border: 0; } .events td:last-child { grid-column: 1 / -1; } }
"""

SCRIPT = """
"use strict";
const figures = [...document.querySelectorAll("figure.chart")].map((figure) => ({
  svg: figure.querySelector("svg"), output: figure.querySelector("output"), cross: figure.querySelector(".cross"),
  points: JSON.parse(figure.dataset.points), scale: JSON.parse(figure.dataset.scale),
  shown: figure.querySelector("output").textContent }));
const nearest = (points, step) => {
  let low = 0, high = points.length - 1;
  while (high - low > 1) { const middle = (low + high) >> 1; points[middle][0] < step ? low = middle : high = middle; }
  return Math.abs(points[low][0] - step) <= Math.abs(points[high][0] - step) ? points[low] : points[high]; };
const show = (step) => figures.forEach((f) => {
  const [x0, x1, y0, y1, log, left, right, top, bottom] = f.scale, [at, value] = nearest(f.points, step);
  const x = left + (at - x0) / (x1 - x0) * (right - left);
  const y = bottom + ((log ? Math.log10(value) : value) - y0) / (y1 - y0) * (top - bottom);
  f.cross.firstChild.setAttribute("transform", `translate(${x} 0)`);
  f.cross.lastChild.setAttribute("transform", `translate(${x} ${y})`);
  f.cross.setAttribute("visibility", "visible");
  f.output.textContent = `step ${at.toLocaleString("en")}: ${value}`; });
const hide = () => figures.forEach((f) => {
  f.cross.setAttribute("visibility", "hidden"); f.output.textContent = f.shown; });
figures.forEach((f) => {
  f.svg.addEventListener("pointermove", (event) => {
    const box = f.svg.getBoundingClientRect(), [x0, x1, , , , left, right] = f.scale;
    const x = (event.clientX - box.left) / box.width * f.svg.viewBox.baseVal.width;
    show(x0 + (Math.min(Math.max(x, left), right) - left) / (right - left) * (x1 - x0)); });
  f.svg.addEventListener("pointerleave", hide); });
"""
