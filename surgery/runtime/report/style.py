"""The look of a report: cards in one column on a phone, in several on a wide screen, light or dark as the reader is."""

STYLE = """
:root{color-scheme:light dark;--page:#f6f7f9;--card:#fff;--ink:#16181d;--soft:#5a616e;--rule:#e1e4ea;--heat:#2a6fc9;
--good:#1a7f4b;--wait:#9a5b00;
--t0:#2a6fc9;--t1:#d8591f;--t2:#1a8a6e;--t3:#8b4fc6;--t4:#b38600;--t5:#c2366f;--t6:#4c7d1f;--t7:#5a616e}
@media(prefers-color-scheme:dark){:root{--page:#111317;--card:#1a1d23;--ink:#e8eaee;--soft:#9aa3b2;--rule:#2c313a;
--heat:#5b9cf0;--good:#4fc486;--wait:#e0a552;
--t0:#5b9cf0;--t1:#f0854e;--t2:#45bd9d;--t3:#b98af0;--t4:#d9b13c;--t5:#ee6f9f;--t6:#8fc35a;--t7:#9aa3b2}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:15px/1.5 system-ui,sans-serif}
main{max-width:1240px;margin:auto;padding:24px 16px 48px}
h1{font-size:1.5rem;line-height:1.25;margin:0 0 4px;overflow-wrap:anywhere}
h2{font-size:1.15rem;margin:36px 0 12px}
h3{font-size:.95rem;margin:0 0 8px}
p{margin:0 0 8px;max-width:80ch;overflow-wrap:anywhere}
.soft,.none{color:var(--soft)}
.state{font-weight:600}.state.good{color:var(--good)}.state.wait{color:var(--wait)}
.notice{border-left:3px solid var(--wait);padding:6px 12px;background:var(--card)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(132px,1fr));gap:10px;margin:18px 0 0}
.tile,.card{background:var(--card);border:1px solid var(--rule);border-radius:8px;padding:12px 14px;min-width:0}
.tile b{display:block;font-size:1.15rem;white-space:nowrap;font-variant-numeric:tabular-nums}
.tile span{color:var(--soft);font-size:.85rem}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,340px),1fr));gap:12px}
.charts>.card>svg{display:block;width:100%;height:auto}
.wide{grid-column:1/-1}
.maps{display:flex;flex-wrap:wrap;gap:12px}.maps>*{flex:0 1 auto;max-width:100%}.maps p{width:0;min-width:100%}
.stack{display:grid;grid-template-columns:minmax(0,1fr);gap:12px}
.legend{display:flex;flex-wrap:wrap;gap:2px 14px;margin:6px 0 0;padding:0;list-style:none;font-size:.85rem}
.legend li::before{content:"";display:inline-block;width:14px;height:3px;border-radius:2px;margin-right:6px;
vertical-align:middle;background:currentColor}
.legend li{color:var(--tone)}.legend li span{color:var(--soft)}
.scroll{overflow-x:auto;max-width:100%}
.scroll svg{display:block}
svg text{font:11.5px system-ui,sans-serif;fill:var(--soft);font-variant-numeric:tabular-nums}
svg .end{text-anchor:end}svg .middle,svg .number{text-anchor:middle}
svg .number{fill:var(--ink);font-size:10.5px;pointer-events:none}
svg .grid{stroke:var(--rule)}
svg .line{fill:none;stroke:var(--tone);stroke-width:1.8;stroke-linejoin:round}
svg .faint{opacity:.32;stroke-width:1}
svg .dot{fill:var(--tone);stroke:var(--card);stroke-width:1}
svg .cell{fill:var(--heat)}
.tone0{--tone:var(--t0)}.tone1{--tone:var(--t1)}.tone2{--tone:var(--t2)}.tone3{--tone:var(--t3)}
.tone4{--tone:var(--t4)}.tone5{--tone:var(--t5)}.tone6{--tone:var(--t6)}.tone7{--tone:var(--t7)}
table{border-collapse:collapse;font-size:.88rem;width:max-content;min-width:100%}
th,td{text-align:left;max-width:60ch;padding:5px 12px 5px 0;border-bottom:1px solid var(--rule);vertical-align:top}
th{color:var(--soft);font-weight:500;white-space:nowrap}
td.n,th.n{text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums}
td.p{font-family:ui-monospace,monospace;font-size:.82rem;white-space:nowrap}
td .why{color:var(--soft);font-family:system-ui,sans-serif;white-space:normal;min-width:24ch;max-width:60ch}
th[scope=rowgroup]{color:var(--ink);padding-top:14px;font-family:ui-monospace,monospace;white-space:normal;font-size:.82rem}
pre{margin:0;font:12.5px/1.5 ui-monospace,monospace;white-space:pre-wrap;overflow-wrap:anywhere}
summary{cursor:pointer;font-weight:600}
details{margin-top:12px}details[open] summary{margin-bottom:10px}
"""
