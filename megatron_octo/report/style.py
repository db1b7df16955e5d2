"""The look of the page: one column, sober, readable on a phone and in print."""

STYLE = """
:root { --ink: #222; --soft: #5a5a5a; --line: #d8d8d8; --accent: #0072B2; --paper: #fff; --tint: #f5f6f8; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, "Segoe UI", Roboto, sans-serif; }
main { max-width: 68rem; margin: 0 auto; padding: 2rem 1.25rem 3rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .6rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.4rem 0 .8rem; padding-bottom: .3rem; border-bottom: 1px solid var(--line); }
.kicker { margin: 0 0 .2rem; color: var(--soft); font-size: .85rem; letter-spacing: .02em; }
.verdict { font-size: 1.12rem; max-width: 52rem; margin: 0; padding-left: .9rem; border-left: 4px solid var(--accent); }
.note { margin: 1rem 0 0; padding: .7rem 1rem; background: #fff7e0; border: 1px solid #e8d28a; border-radius: 4px; }
.note ul { margin: .3rem 0 0; padding-left: 1.2rem; }
.caption, footer { color: var(--soft); font-size: .85rem; margin: .5rem 0 0; }
footer { margin-top: 3rem; padding-top: .8rem; border-top: 1px solid var(--line); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
thead th { font-weight: 600; color: var(--soft); border-bottom: 2px solid var(--ink); }
tbody th { font-weight: 600; }
figure { margin: 0 0 1rem; min-width: 0; break-inside: avoid; }
figcaption { font-weight: 600; font-size: .95rem; }
.grid { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: .5rem 1.5rem; }
.multiples { display: grid; grid-template-columns: repeat(3, minmax(0, 1fr)); gap: .2rem 1.2rem; }
.multiples figcaption { font-size: .85rem; }
.caption ul { margin: .2rem 0 1rem; padding-left: 1.2rem; }
.tree, .tree ul { list-style: none; margin: 0; padding: 0; }
.tree { width: max-content; padding: .3rem 0; }
.tree li { display: flex; align-items: center; position: relative; }
.tree ul { padding-left: 2rem; position: relative; }
.tree ul > li { padding: .35rem 0; }
.tree ul > li::before { content: ""; position: absolute; left: -1rem; width: 1rem; top: 50%;
  border-top: 1.5px solid #999; }
.tree ul > li::after { content: ""; position: absolute; left: -1rem; top: 0; bottom: 0; border-left: 1.5px solid #999; }
.tree ul > li:first-child::after { top: 50%; }
.tree ul > li:last-child::after { bottom: 50%; }
.tree ul > li:only-child::after { display: none; }
.tree ul::before { content: ""; position: absolute; left: 0; width: 1rem; top: 50%; border-top: 1.5px solid #999; }
.box { display: flex; flex-direction: column; width: 11.3rem; padding: .45rem .7rem; background: var(--tint);
  border: 1px solid var(--line); border-left: 4px solid #888; border-radius: 4px; font-size: .85rem;
  line-height: 1.35; }
.box b { overflow-wrap: anywhere; }
.box.train { border-left-color: #E69F00; } .box.rl { border-left-color: var(--accent); }
.box .kind, .box span, .box code { color: var(--soft); font-size: .8rem; }
code, pre { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
details { border-bottom: 1px solid var(--line); padding: .35rem 0; }
summary { cursor: pointer; overflow-wrap: anywhere; }
pre { overflow-x: auto; background: var(--tint); padding: .8rem; font-size: .8rem; line-height: 1.4; }
@media (max-width: 46rem) {
  main { padding: 1.2rem .9rem 2rem; }
  .grid, .multiples { grid-template-columns: minmax(0, 1fr); }
  .tree { width: auto; }
  .tree li { flex-direction: column; align-items: flex-start; }
  .tree ul { padding-left: 1.2rem; }
  .tree ul::before { display: none; }
  .tree ul > li::before { left: -.7rem; width: .7rem; top: 1.6rem; }
  .tree ul > li::after, .tree ul > li:only-child::after { display: block; left: -.7rem; top: 0; bottom: 0; }
  .tree ul > li:first-child::after { top: 0; }
  .tree ul > li:last-child::after { bottom: auto; height: 1.6rem; }
}
@media print {
  main { max-width: none; padding: 0; }
  .grid { grid-template-columns: minmax(0, 1fr); }
  .multiples { grid-template-columns: repeat(2, minmax(0, 1fr)); }
  body { font-size: 11pt; }
  .scroll { overflow: visible; }
  th, td { padding: .25rem .4rem; }
  table { font-size: 8.5pt; }
  .tree { zoom: .68; }
  #settings { display: none; }
  h2, figcaption { break-after: avoid; }
  tr, .tree, .caption { break-inside: avoid; }
}
"""
