"""The style sheet of the grid's HTML page: light and dark, narrow and wide."""

STYLE = """
:root { color-scheme: light dark; --back: #fff; --ink: #1c1c1e; --soft: #63636b; --line: #d8d8dd;
  --card: #f6f6f8; --good: #1a7f37; --goodback: #dff3e4; --bad: #b31d28; --badback: #fde2e4;
  --warn: #7a4a00; --warnback: #fdeccb; --grey: #73737b; --greyback: #f0f0f2; }
@media (prefers-color-scheme: dark) { :root { --back: #17181b; --ink: #e8e8ea; --soft: #a0a0a8;
  --line: #37383d; --card: #202125; --good: #6fd68a; --goodback: #15321d; --bad: #ff8f8f;
  --badback: #45191d; --warn: #f0b963; --warnback: #3b2a0c; --grey: #9a9aa2;
  --greyback: #26272b; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--ink); line-height: 1.5;
  font-family: system-ui, "Segoe UI", Roboto, "Liberation Sans", sans-serif;
  overflow-wrap: anywhere; }
main { max-width: 1240px; margin: 0 auto; padding: 1rem; }
h1 { font-size: clamp(1.4rem, 3vw, 2rem); margin: .4rem 0; }
h2 { font-size: 1.25rem; margin: 2rem 0 .3rem; padding-top: 1rem;
  border-top: 1px solid var(--line); }
h3 { font-size: 1.02rem; margin: 1.4rem 0 .2rem; }
p { margin: .4rem 0; max-width: 56rem; } .lead { font-size: 1.02rem; }
.soft { color: var(--soft); font-size: .86rem; }
code, pre { font-family: ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  font-size: .85rem; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 4px; margin: .5rem 0;
  padding: .6rem .8rem; overflow: auto; max-height: 30rem; white-space: pre; }
a { color: inherit; } section { scroll-margin-top: 1rem; }
.plain { padding-left: 1.1rem; margin: .4rem 0; }
.legend { display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; padding: 0; list-style: none;
  font-size: .9rem; }
.legend .cell { display: inline-block; width: 1.7em; margin-right: .3em; border-radius: 3px; }
.scroll { overflow-x: auto; margin: .8rem 0; border: 1px solid var(--line); border-radius: 4px; }
table { border-collapse: separate; border-spacing: 0; font-size: .9rem; }
thead th { vertical-align: bottom; padding: .4rem .1rem; font-weight: 600; }
thead th span { writing-mode: vertical-rl; transform: rotate(180deg); white-space: nowrap; }
th[scope=row], th[rowspan] { position: sticky; left: 0; text-align: left;
  background: var(--back); padding: .25rem .7rem; white-space: nowrap; font-weight: 500;
  border-right: 1px solid var(--line); }
thead th.group { text-align: left; padding: .3rem .5rem 0; font-size: .8rem; color: var(--soft);
  border-left: 1px solid var(--line); white-space: nowrap; }
tbody :is(th, td) { border-top: 1px solid var(--line); }
.cell { text-align: center; font-weight: 700; } td.cell { min-width: 2.3rem; padding: .25rem; }
.cell a { display: block; text-decoration: none; }
.passed { color: var(--good); background: var(--goodback); }
.failed, .unconfirmed { color: var(--bad); background: var(--badback); }
.documented, .stopped { color: var(--warn); background: var(--warnback); }
.hidden { color: var(--bad); background: var(--greyback); }
.not_covered, .not_run { color: var(--grey); background: var(--greyback); }
.columns { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; }
.columns dt { font-weight: 600; } .columns dd { margin: 0; }
summary { cursor: pointer; margin: .3rem 0; }
@media (max-width: 600px) { th[scope=row] .soft { display: block; }
  th[scope=row] { overflow-wrap: normal; padding: .25rem .5rem; font-size: .82rem; }
  td.cell { min-width: 2rem; } }
"""
