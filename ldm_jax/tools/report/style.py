"""CSS of a report: one column, light or dark as the browser's setting."""

STYLE = """
:root { color-scheme: light dark; --page: #faf9f7; --card: #ffffff; --ink: #22242a;
  --soft: #676b76; --rule: #e4e2dd; --accent: #3155c6; --good: #1f7a4d; --wait: #a2600a;
  --curve-0: #3155c6; --curve-1: #c2571a; --curve-2: #8a8f9c; --curve-3: #1f7a4d; }
@media (prefers-color-scheme: dark) { :root { --page: #16181d; --card: #1e2128;
  --ink: #e7e8ec; --soft: #9aa0ae; --rule: #31353f; --accent: #8fabff; --good: #62c894;
  --wait: #e6ab5a; --curve-0: #8fabff; --curve-1: #f0935a; --curve-2: #7d8492;
  --curve-3: #62c894; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1040px; margin: 0 auto; padding: 40px 24px 80px; }
header h1 { font-size: 2.4rem; line-height: 1.15; margin: 0 0 8px;
  letter-spacing: -0.02em; overflow-wrap: anywhere; }
header p { margin: 0; color: var(--soft); }
.over { font-size: 0.85rem; letter-spacing: 0.02em; margin-bottom: 6px !important; }
.finished { color: var(--good); font-weight: 600; }
.unfinished { color: var(--wait); font-weight: 600; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(165px, 1fr));
  gap: 12px; margin: 28px 0 12px; }
.tile { background: var(--card); border: 1px solid var(--rule); border-radius: 12px;
  padding: 14px 16px; display: flex; flex-direction: column; }
.tile span { color: var(--soft); font-size: 0.82rem; }
.tile strong { font-size: 1.2rem; font-variant-numeric: tabular-nums; }
section { margin-top: 44px; }
h2 { font-size: 1.3rem; margin: 0 0 14px; letter-spacing: -0.01em; }
section > p { color: var(--soft); max-width: 46rem; margin: 12px 0 0; }
section p strong { color: var(--ink); }
figure { margin: 0 0 16px; background: var(--card); border: 1px solid var(--rule);
  border-radius: 12px; padding: 14px; }
figure img { display: block; margin: 0 auto; }
img { max-width: 100%; height: auto; image-rendering: pixelated; border-radius: 4px; }
figure > img { width: 100%; max-width: 820px; }
figcaption { color: var(--soft); font-size: 0.85rem; margin-top: 10px;
  overflow-wrap: anywhere; }
.pair { display: grid; gap: 16px; margin-top: 16px;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 400px), 1fr)); }
.row { display: grid; grid-template-columns: repeat(auto-fill, minmax(180px, 1fr));
  gap: 12px; }
.row figure { margin: 0; padding: 10px; }
.pairs { display: grid; grid-template-columns: repeat(auto-fill, minmax(84px, 1fr));
  gap: 12px; }
.two { display: flex; flex-direction: column; gap: 4px; background: var(--card);
  border: 1px solid var(--rule); border-radius: 10px; padding: 8px; }
.two img { width: 100%; }
.scroll { overflow-x: auto; background: var(--card); border: 1px solid var(--rule);
  border-radius: 12px; }
table { border-collapse: collapse; width: 100%; font-size: 0.85rem;
  font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 9px 10px; white-space: nowrap; }
th { color: var(--soft); font-weight: 500; }
tbody tr { border-top: 1px solid var(--rule); }
.facts tbody tr:first-child { border-top: 0; }
.facts td:first-child { color: var(--soft); width: 1%; }
.facts td:last-child { white-space: normal; overflow-wrap: anywhere; }
pre { background: var(--card); border: 1px solid var(--rule); border-radius: 12px;
  padding: 14px 16px; overflow-x: auto; font: 0.82rem/1.6 ui-monospace, Menlo, Consolas,
  monospace; }
details summary { cursor: pointer; color: var(--accent); margin-top: 12px; }
.chart { display: block; width: 100%; height: auto; }
.chart text { font-size: 12px; fill: var(--soft); }
.legend { display: flex; flex-wrap: wrap; gap: 4px 16px; color: var(--soft);
  font-size: 0.82rem; margin-top: 6px; }
.legend i { display: inline-block; width: 14px; height: 3px; border-radius: 2px;
  margin-right: 6px; vertical-align: middle; }
.chart .rule { stroke: var(--rule); }
.chart polyline { fill: none; }
.chart .thin { stroke-width: 1; opacity: 0.3; }
.chart .thick { stroke-width: 2; }
@media (max-width: 560px) { .chart text { font-size: 18px; }
  .pairs { grid-template-columns: repeat(auto-fill, minmax(62px, 1fr)); gap: 8px; }
  .two { padding: 5px; }
  main { padding: 24px 14px 60px; }
  header h1 { font-size: 1.8rem; } figure { padding: 10px; } }
"""
