"""How a report's page looks: one style sheet, written into the page. Light, dark, a phone and paper.

Colours of outcomes differ in lightness as well as in hue, and each stands beside a sign and a word. Text and audio have the
colours that the documents' charts give them. Letters in charts are in units of a chart's view box, so they are larger where the
chart is smaller. It knows class names and nothing of what stands in them.
"""

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #ffffff; --panel: #f4f6f8; --rule: #d9dfe4; --soft: #56616b; --ink: #1a2025; --link: #1f6f8b;
  --pass: #1b7a4b; --ambiguous: #8f5f00; --fail: #b3261e; --skipped: #5f6b75;
  --m0: #1f6f8b; --m1: #d08c3c; --m2: #7a5aa6; --m3: #4f7f3a; --m4: #a8456b; --m5: #3b4a9c;
  --s1: #dfe4e8; --s2: #c3ccd3; --s3: #9aa6b0; --s4: #6d7a85; --s5: #1a2025; --s6: #46525c;
  --exact: #e9edf0; --broken: #d6247f;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    --paper: #12171b; --panel: #1b2228; --rule: #323c44; --soft: #a4b0ba; --ink: #e7ebee; --link: #6cbcd6;
    --pass: #4cc38a; --ambiguous: #e0ab3d; --fail: #ff8078; --skipped: #9aa6b0;
    --m0: #4fa9c9; --m1: #dfa25a; --m2: #ab8fd6; --m3: #86b86c; --m4: #dc7fa3; --m5: #8f9ce6;
    --s1: #38424a; --s2: #48545e; --s3: #5f6c76; --s4: #8593a0; --s5: #e7ebee; --s6: #b4c0c9;
    --exact: #2a3239; --broken: #ff5fae;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }
body {
  margin: 0 auto; padding: 1.5rem 1.25rem 3rem; max-width: 72rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; overflow-wrap: anywhere;
}
h1, h2, h3, p, ul, figure { margin: 0; }
h2 { font-size: 1.4rem; line-height: 1.25; margin-bottom: .75rem; }
h3 { font-size: 1.05rem; line-height: 1.35; }
ul { padding: 0; list-style: none; }
a { color: var(--link); }
code { font: .85em/1.4 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
section { margin-top: 2.75rem; padding-top: 1.25rem; border-top: 1px solid var(--rule); }
section > p { color: var(--soft); max-width: 46rem; margin-bottom: .75rem; }
footer { margin-top: 3rem; padding-top: 1rem; border-top: 1px solid var(--rule); color: var(--soft); font-size: .875rem; }

.pass { --tone: var(--pass); --block: #1b7a4b; } .ambiguous { --tone: var(--ambiguous); --block: #8f5f00; }
.fail { --tone: var(--fail); --block: #b3261e; } .skipped, .unknown { --tone: var(--skipped); --block: #56616b; }

.verdict { display: flex; background: var(--panel); border-radius: .6rem; overflow: hidden; }
.verdict h1 {
  flex: none; min-width: 11rem; padding: 1.5rem 1.25rem; display: flex; flex-direction: column; align-items: center;
  justify-content: center; background: var(--block); color: #ffffff;
  font-size: 1.7rem; letter-spacing: .04em; line-height: 1.2;
}
.verdict h1 span { font-size: 2.6rem; line-height: 1; margin-bottom: .35rem; }
.verdict > div { padding: 1.25rem 1.5rem; min-width: 0; align-self: center; }
.lead { font-size: 1.125rem; color: var(--ink); }
.failures { margin-top: .75rem; font-size: .95rem; }
.failures li { padding-left: .75rem; border-left: 3px solid var(--tone); margin-top: .4rem; }
.chips { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; margin-top: .9rem; font-size: .9rem; color: var(--soft); }
.chips span { color: var(--tone); font-weight: 700; }
.outcome { color: var(--tone); font-weight: 700; font-size: .85em; letter-spacing: .02em; white-space: nowrap; }

.notes { margin-top: 1rem; padding: .9rem 1.25rem; border: 1px solid var(--rule); border-left: 4px solid var(--ambiguous);
  border-radius: .4rem; }
.notes h2 { font-size: 1rem; margin-bottom: .25rem; }
.notes li + li { margin-top: .3rem; }
nav { display: flex; flex-wrap: wrap; gap: .35rem 1.25rem; margin-top: 1.25rem; font-size: .95rem; }

.scroll { overflow-x: auto; margin: .75rem 0; border: 1px solid var(--rule); border-radius: .4rem; }
.scroll:focus-visible { outline: 2px solid var(--link); outline-offset: 2px; }
table { border-collapse: collapse; width: 100%; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .55rem; text-align: left; vertical-align: top; border-bottom: 1px solid var(--rule); }
tbody tr:last-child > * { border-bottom: 0; }
thead th { color: var(--soft); font-weight: 600; vertical-align: bottom; background: var(--panel); }
tbody th { font-weight: 600; }
.number { text-align: right; white-space: nowrap; }
thead .number { white-space: normal; }
tbody th { min-width: 4rem; }
tbody td:nth-child(2) { min-width: 8rem; }
th, td { overflow-wrap: normal; }
td code { overflow-wrap: anywhere; }
.detail td { padding-top: 0; }
.detail p { color: var(--tone); position: sticky; left: .55rem; width: fit-content; max-width: min(44rem, 100vw - 4.5rem); }
tr:has(+ .detail) > * { border-bottom: 0; padding-bottom: .15rem; }
.differs > * { font-weight: 700; color: var(--ambiguous); }
.first > * { background: var(--panel); font-weight: 700; }

.share { display: flex; align-items: center; gap: .5rem; white-space: nowrap; }
.bar { width: 6.5rem; height: .78rem; flex: none; }
.track { fill: var(--rule); } .tone { fill: var(--tone); } .edge { stroke: var(--ink); stroke-width: 1.2; }

details { margin-top: .75rem; }
summary h3 { display: inline; color: var(--ink); }
summary { cursor: pointer; color: var(--link); font-size: .95rem; padding: .15rem 0; }
details > ul { margin-top: .5rem; }
.explanation { list-style: disc; padding-left: 1.25rem; color: var(--soft); max-width: 46rem; }
.explanation li { white-space: pre-wrap; }

.rung + .rung { margin-top: 1.1rem; }
.rung > details { margin-top: .5rem; }
.rung small { color: var(--soft); font-weight: 400; font-size: .875rem; margin-left: .35rem; }
.rung h3 { font-weight: 500; }
.findings li { padding: .5rem .9rem; margin-top: .5rem; border-left: 4px solid var(--tone); background: var(--panel);
  border-radius: 0 .35rem .35rem 0; }
.findings .pass { background: none; padding: .15rem .9rem; border-left-width: 2px; }
.findings .pass p { display: inline; margin-left: .6rem; }
.findings p { font-size: .95rem; margin-top: .15rem; }
.findings .figures { font-size: .85rem; color: var(--soft); font-variant-numeric: tabular-nums; }
.question { font-weight: 600; }
.pass .question { font-weight: 400; }
.graph { font-size: .8rem; border: 1px solid var(--rule); border-radius: 1rem; padding: .05rem .5rem; color: var(--soft); }

figure { margin-top: 1.5rem; }
section > figure:first-of-type { margin-top: 0; }
figcaption p { color: var(--soft); font-size: .95rem; margin-top: .4rem; max-width: 46rem; }
figcaption p + p { color: var(--ink); }
.legend { display: flex; flex-wrap: wrap; gap: .3rem 1.1rem; margin-top: .7rem; font-size: .875rem; }
.legend + .legend { margin-top: .3rem; }
.legend .of { color: var(--soft); min-width: 5.5rem; }
.legend li { display: flex; align-items: center; gap: .4rem; }
.swatch { width: .95rem; height: .95rem; flex: none; }
.canvas { margin-top: .75rem; min-width: 0; }
.beside { display: grid; grid-template-columns: minmax(0, 21rem) minmax(0, 1fr); gap: 0 2rem; align-items: start; }
.beside .legend { flex-direction: column; }
.beside .canvas { margin-top: 0; }
.plan + .plan { margin-top: 1rem; }
.plan p { font-size: .95rem; margin-bottom: .25rem; }
.plan .fail { color: var(--tone); font-weight: 600; }

svg { display: block; }
.chart { width: 100%; height: auto; overflow: visible; }
.chart text { font-size: 11px; fill: var(--soft); font-variant-numeric: tabular-nums; }
.wide text { font-size: 8.5px; }
.chart .name { fill: var(--ink); }
.rules line { stroke: var(--rule); stroke-width: 1; }
.tick { stroke: var(--soft); stroke-width: .8; }
.frame { fill: none; stroke: var(--soft); stroke-width: .8; }
.limit { stroke: var(--fail); stroke-width: 1.6; stroke-dasharray: 6 4; fill: none; }
.boundary { stroke: var(--ink); stroke-width: 1.3; }
.ground { fill: var(--fail); opacity: .09; }
.m0 { --mark: var(--m0); } .m1 { --mark: var(--m1); } .m2 { --mark: var(--m2); } .m3 { --mark: var(--m3); }
.m4 { --mark: var(--m4); } .m5 { --mark: var(--m5); } .mixed { --mark: var(--soft); }
.m0, .m1, .m2, .m3, .m4, .m5, .mixed { fill: var(--mark); fill-opacity: .6; }
rect.m0, rect.m1, rect.m2, rect.m3, rect.m4, rect.m5, rect.mixed { fill-opacity: 1; }
polyline.middle, line.middle { fill: none; stroke: var(--mark); stroke-width: 2.6; stroke-linejoin: round; }
polyline.most, line.most { fill: none; stroke: var(--mark); stroke-width: 1.3; stroke-dasharray: 1.5 2.5; }
.flip { fill-opacity: 1; stroke: var(--ink); stroke-width: 1.6; }
.over { fill-opacity: 1; stroke: var(--fail); stroke-width: 1.3; }
.swatch .flip, .swatch .over { fill: none; }
.shade1 { fill: var(--s1); } .shade2 { fill: var(--s2); } .shade3 { fill: var(--s3); } .shade4 { fill: var(--s4); }
.shade5 { fill: var(--s5); } .shade6 { fill: var(--s6); }
.exact { fill: var(--exact); } .unasked { fill: var(--rule); } .broken { fill: var(--broken); }
.cross { stroke: var(--paper); stroke-width: 2; fill: none; pointer-events: none; }

@media (max-width: 60rem) {
  thead .number { min-width: 5rem; }
  .beside { display: block; }
  .beside .legend { flex-direction: row; }
  .beside .canvas { margin: .75rem auto 0; max-width: 40rem; }
  .wide text { font-size: 11px; }
}
@media (max-width: 37.5rem) {
  body { padding: 1rem 1rem 2rem; }
  .verdict { display: block; }
  .verdict h1 { flex-direction: row; gap: .6rem; padding: .8rem 1rem; font-size: 1.5rem; }
  .verdict h1 span { font-size: 1.7rem; margin: 0; }
  .verdict > div { padding: 1rem; }
  .chart text { font-size: 17px; }
  .wide text { font-size: 19px; }
  tbody th:first-child, thead th:first-child { position: sticky; left: 0; max-width: 9rem; }
  tbody th:first-child { background: var(--paper); }
}
@media print {
  :root { color-scheme: light; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  @page { margin: 14mm 12mm; }
  body { padding: 0; max-width: none; font-size: 10pt; }
  nav { display: none; }
  section { margin-top: 1.5rem; }
  h2, h3, summary, thead { break-after: avoid; }
  tr:has(+ .detail) { break-after: avoid; }
  .verdict, figure, .plan, tr, .findings li { break-inside: avoid; }
  details::details-content { content-visibility: visible; display: block; height: auto; }
  summary { color: var(--soft); list-style: none; }
  .scroll { overflow: visible; border: 0; }
  table { font-size: 7pt; }
  th, td { padding: .2rem .22rem; }
  thead .number { min-width: 0; }
  .bar { width: 2.5rem; }
  tbody td:nth-child(2) { min-width: 0; }
  .detail p { position: static; max-width: none; }
  .beside .canvas { max-width: 34rem; }
  tbody th:first-child, thead th:first-child { position: static; }
}
"""
