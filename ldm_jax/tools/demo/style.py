"""CSS of the page: controls beside images, one column on a phone, light or dark."""

PRIMARY = "#3155c6"

STYLE = """
:root { --page: #faf9f7; --card: #ffffff; --ink: #22242a; --soft: #676b76;
  --rule: #e4e2dd; --wrong: #b3261e; }
.body--dark { --page: #16181d; --card: #1e2128; --ink: #e7e8ec; --soft: #9aa0ae;
  --rule: #31353f; --wrong: #ff8a80; }
body { background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
.nicegui-content { display: block; padding: 0; }
.page { max-width: 1180px; margin: 0 auto; padding: 28px 24px 48px; display: grid;
  grid-template-columns: 320px minmax(0, 1fr); gap: 20px; align-items: start; }
.title { grid-column: 1 / -1; }
.title h1 { font-size: 1.9rem; line-height: 1.15; margin: 0; font-weight: 700;
  letter-spacing: -0.02em; overflow-wrap: anywhere; }
.title p { margin: 4px 0 0; color: var(--soft); font-size: 0.9rem; }
.body--dark { --q-primary: #8fabff !important; }
.card { background: var(--card); border: 1px solid var(--rule); border-radius: 12px;
  padding: 18px; min-width: 0; }
.controls { grid-row: span 2; display: flex; flex-direction: column; gap: 14px; }
.controls .q-field, .controls .q-slider { width: 100%; }
.named { display: flex; justify-content: space-between; font-size: 0.9rem; }
.named span:last-child { color: var(--soft); font-variant-numeric: tabular-nums; }
.seed { display: flex; gap: 8px; align-items: center; }
.seed .q-field { flex: 1; }
.images { display: grid; gap: 12px; margin: 0 auto; }
.images figure { margin: 0; min-width: 0; }
.images img { display: block; width: 100%; height: auto; border-radius: 6px;
  image-rendering: pixelated; background: var(--rule); transition: opacity 0.2s; }
.images .old { opacity: 0.3; transition-delay: 0.3s; }
.images figcaption { display: flex; justify-content: space-between; gap: 6px;
  color: var(--soft); font-size: 0.8rem; margin-top: 4px;
  font-variant-numeric: tabular-nums; flex-wrap: wrap; }
.images a { color: inherit; }
.status { min-height: 1.5em; margin: 0 0 12px; color: var(--soft); font-size: 0.9rem;
  overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
.status.wrong { color: var(--wrong); }
.command { display: flex; gap: 8px; align-items: center; padding: 10px 18px; }
.command code { flex: 1; min-width: 0; font: 0.8rem/1.6 ui-monospace, Menlo, Consolas,
  monospace; overflow-wrap: anywhere; white-space: pre-wrap; }
@media (max-width: 760px) {
  .page { grid-template-columns: minmax(0, 1fr); padding: 18px 14px 40px; gap: 14px; }
  .title h1 { font-size: 1.5rem; }
  .result { order: 1; } .controls { order: 2; } .command { order: 3; }
  .card { padding: 14px; } .images { gap: 8px; } }
"""
