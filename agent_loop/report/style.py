"""The page's one style sheet. The page's policy names its hash, so nothing else can style the page."""

__all__ = ["STYLE"]

STYLE = """
:root{color-scheme:light dark;--bg:#fcfcfa;--fg:#1c1c1a;--soft:#5d5c56;--rule:#e0dfd8;--panel:#f3f2ed;--keep:#17703f;
--keep-dot:#1f8a50;--warn:#8a5300;--fail:#ad2f26;--blue:#2a63a8;--violet:#7a4fa3;--dot:#a3a199;--band:#2a63a81c;
--idle:#ecebe4;--add:#17703f17;--del:#ad2f2614}
@media (prefers-color-scheme:dark){:root{--bg:#171716;--fg:#e8e7e1;--soft:#a5a39a;--rule:#34332f;--panel:#21201e;
--keep:#63cb8f;--keep-dot:#4fbd7e;--warn:#e3ac52;--fail:#f19184;--blue:#86b6f0;--violet:#c2a0e6;--dot:#85837b;
--band:#86b6f024;--idle:#2a2926;--add:#63cb8f1f;--del:#f191841c}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;text-size-adjust:100%;scroll-padding-top:12px}
body{margin:0 auto;padding:20px 16px 64px;max-width:1040px;background:var(--bg);color:var(--fg);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;
font-variant-numeric:tabular-nums;overflow-wrap:anywhere}
h1{font-size:15px;font-weight:600;margin:0;color:var(--soft)}
h2{font-size:18px;margin:34px 0 4px;padding-top:14px;border-top:1px solid var(--rule);line-height:1.3}
h3{font-size:15px;margin:20px 0 4px;line-height:1.3}
p{margin:6px 0;max-width:76ch}
a{color:var(--blue)}
.soft,figcaption,.meta{color:var(--soft)}
.meta,figcaption,.legend{font-size:13px}
.score{display:flex;flex-wrap:wrap;align-items:baseline;gap:2px 14px;margin:6px 0 2px;font-size:32px;font-weight:650;
line-height:1.2;letter-spacing:-.01em}
.score .unit{font-size:15px;font-weight:400;color:var(--soft);letter-spacing:0}
.score .gain{font-size:19px;color:var(--keep)}
.score .loss{font-size:19px;color:var(--fail)}
.facts{display:grid;grid-template-columns:repeat(auto-fill,minmax(150px,1fr));gap:12px 20px;margin:16px 0 0}
.facts div{min-width:0}
.facts dt{font-size:13px;color:var(--soft)}
.facts dd{margin:0;line-height:1.35}
nav{display:flex;flex-wrap:wrap;gap:2px 16px;margin:20px 0 0;font-size:14px}
nav a{padding:4px 0}
figure{margin:10px 0}
figcaption{margin-top:4px;max-width:84ch}
svg{display:block;width:100%;height:auto}
.narrow{display:none}
@media (max-width:700px){.wide{display:none}.narrow{display:block}.score{font-size:27px}
.facts{grid-template-columns:1fr 1fr}h2{margin-top:28px}}
svg text{font-size:11px;fill:var(--soft)}
svg .mid{text-anchor:middle}svg .end{text-anchor:end}
svg .label{fill:var(--fg);paint-order:stroke;stroke:var(--bg);stroke-width:3px;stroke-linejoin:round}
svg .grid{stroke:var(--rule);stroke-width:1;fill:none}
svg .axis{stroke:var(--dot);stroke-width:1;fill:none}
svg .best{stroke:var(--keep-dot);stroke-width:2;fill:none}
svg .band{fill:var(--band)}
svg .dots{stroke:var(--dot);stroke-width:5;stroke-linecap:round;fill:none}
svg .above{fill:var(--dot)}
svg .kept{fill:var(--keep-dot);stroke:var(--bg);stroke-width:1.5}
svg .line{fill:none;stroke-width:1.6;stroke:var(--dot);stroke-linejoin:round}
svg .val,svg .incumbent{stroke:var(--keep-dot);stroke-width:2.2}
svg .holdout{stroke:var(--blue);stroke-width:2;stroke-dasharray:6 4}
svg .mark{stroke:none}svg .mark.val{fill:var(--keep-dot)}svg .mark.holdout{fill:var(--blue)}
svg .baseline{stroke:var(--fg);stroke-dasharray:7 4}
svg .c0{stroke:var(--blue)}svg .c1{stroke:var(--warn);stroke-dasharray:3 3}
svg .c2{stroke:var(--violet);stroke-dasharray:10 3}svg .c3{stroke:var(--fail);stroke-dasharray:9 3 2 3}
svg .idle{fill:var(--idle)}
svg .run{fill:var(--dot)}svg .run.keep{fill:var(--keep-dot)}svg .run.marginal{fill:var(--warn)}
svg .run.measured{fill:var(--blue)}svg .run.failed{fill:var(--bg);stroke:var(--fail);stroke-width:1.2}
.legend{display:flex;flex-wrap:wrap;gap:2px 18px;color:var(--soft);margin:6px 0;padding:0;list-style:none}
.legend svg,.share svg{display:inline-block;vertical-align:-1px}
.legend svg{width:26px;height:12px;margin-right:6px}
.share svg{width:120px;height:10px;fill:var(--keep-dot)}
.share rect.device{fill:var(--dot)}.share rect.waits{fill:var(--warn)}
table{border-collapse:collapse;width:100%;font-size:14px;line-height:1.4}
th{text-align:left;font-weight:500;font-size:13px;color:var(--soft)}
th,td{padding:6px 12px 6px 0;border-bottom:1px solid var(--rule);vertical-align:top}
th:last-child,td:last-child{padding-right:0}
th.n,td.n{text-align:right;white-space:nowrap}
tfoot td{font-weight:600;border-bottom:0}
.scroll{overflow-x:auto;-webkit-overflow-scrolling:touch;max-width:100%}
.scroll:focus-visible,summary:focus-visible{outline:2px solid var(--blue);outline-offset:2px}
.all table{min-width:820px}
.all td:nth-child(5){min-width:200px}.all td:nth-child(6){min-width:260px;color:var(--soft)}
.ledger td:first-child,.ledger th,.turns td:first-child,.turns th{white-space:nowrap}
.gains td:nth-child(2){min-width:200px;width:64%}.turns td:nth-child(2){min-width:170px}
@media (max-width:700px){.share svg{width:60px}
.gains table,.gains tbody,.gains tfoot{display:block}.gains thead{display:none}
.gains tr{display:grid;grid-template-columns:32px 1fr 1fr 1fr;border-bottom:1px solid var(--rule);padding:8px 0}
.gains td,.gains td:nth-child(2){border:0;padding:0;min-width:0;width:auto}.gains td:nth-child(1){text-align:left}
.gains td:nth-child(2){grid-column:2/5}.gains td:nth-child(3){grid-column:2}
.gains td[data-name]{text-align:left;padding-top:4px;white-space:normal}
.gains td.none{display:none}
.gains td[data-name]::before{content:attr(data-name);display:block;font-size:12px;font-weight:400;color:var(--soft)}}
.tag{white-space:nowrap}
.keep{color:var(--keep);font-weight:600}.marginal{color:var(--warn)}.failed{color:var(--fail)}.measured{color:var(--blue)}
.discard{color:var(--soft)}
code,pre{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,"Liberation Mono",monospace;font-size:12.5px}
pre{margin:8px 0;padding:10px 12px;background:var(--panel);border-radius:6px;overflow-x:auto;line-height:1.45;
max-height:32em;white-space:pre;overflow-wrap:normal;tab-size:4}
pre span{display:block;width:max-content;min-width:100%}
pre .add{background:var(--add);color:var(--keep)}pre .del{background:var(--del);color:var(--fail)}
pre .hunk{color:var(--blue)}
details{border-bottom:1px solid var(--rule);padding:2px 0}
summary{cursor:pointer;padding:6px 0}
ul.plain{list-style:none;padding:0;margin:6px 0}ul.plain li{padding:3px 0}
.commands td:first-child{min-width:190px}
"""
