"""The style sheet and the script of the calibration page; it loads nothing from elsewhere."""

CSS = """
:root{color-scheme:light dark;--page:#f6f7f9;--card:#fff;--ink:#16191f;--soft:#5b6472;--faint:#8a93a1;--rule:#e3e6eb;
--track:#edf0f4;--before:#c3cad5;--main:#2b5fd0;--second:#c2571a;--heat:#1f4fb8;--over:#fff;--warn:#8a5a00;
--warn-back:#fff6e0;--warn-rule:#ecd49a;--good:#17703e}
@media (prefers-color-scheme:dark){:root{--page:#0f1216;--card:#171b21;--ink:#e8ebf0;--soft:#a2abb9;--faint:#7b8594;
--rule:#2a303a;--track:#222831;--before:#4a5464;--main:#7aa5ff;--second:#ff9d5c;--heat:#8db4ff;--over:#0d1424;
--warn:#f2c566;--warn-back:#2a2314;--warn-rule:#57461e;--good:#6fd19a}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--page);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,
"Helvetica Neue",Arial,sans-serif;font-variant-numeric:tabular-nums}
main{max-width:1060px;margin:0 auto;padding:40px 24px 64px}
h1{font-size:30px;line-height:1.2;letter-spacing:-.02em;margin:4px 0 6px;overflow-wrap:anywhere}
h2{font-size:18px;letter-spacing:-.01em;margin:0 0 14px}
h2:has(+.hint){margin-bottom:2px}
h3{font-size:13px;font-weight:600;margin:0 0 8px;overflow-wrap:anywhere}
p{margin:0}
.over-line{font-size:12px;font-weight:600;letter-spacing:.06em;text-transform:uppercase;color:var(--soft)}
.lead,.hint{color:var(--soft)}
.hint{font-size:13.5px;margin-bottom:16px;max-width:76ch}
section{background:var(--card);border:1px solid var(--rule);border-radius:12px;padding:22px 24px;margin-top:20px}
.tiles{display:flex;flex-wrap:wrap;gap:1px;padding:0;overflow:hidden;background:var(--rule)}
.tile{flex:1 1 calc(25% - 1px);background:var(--card);padding:16px 20px}
.tiles.thirds .tile{flex-basis:calc(33.3% - 1px)}
.tile dt{font-size:12.5px;color:var(--soft)}
.tile dd{margin:2px 0 0;font-size:24px;font-weight:600;letter-spacing:-.02em;line-height:1.25;white-space:nowrap}
.tile dd small{display:block;font-size:12.5px;font-weight:400;letter-spacing:0;color:var(--soft);white-space:normal;
overflow-wrap:anywhere}
.notices{background:var(--warn-back);border-color:var(--warn-rule)}
.notices ul{margin:8px 0 0;padding-left:20px}
.notices li{margin:6px 0}
.notices summary{cursor:pointer;color:var(--soft);font-size:13.5px}
.notices h2{color:var(--warn)}
.fine{color:var(--good);font-size:14px;margin-top:14px}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,380px),1fr));gap:24px 40px}
.apart{margin-top:28px}
.panels{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,290px),1fr));gap:24px 28px;margin-top:24px}
svg.chart{display:block;width:100%;height:auto;overflow:visible}
svg.narrow{display:none}
svg text{font-size:12px;fill:var(--soft);font-family:inherit}
svg text.label,svg text.value{fill:var(--ink)}
svg text.over{fill:var(--over)}
svg text.axis{font-size:11.5px}
svg text.tick{font-size:11px;fill:var(--soft)}
svg .grid{stroke:var(--rule);stroke-width:1}
svg .heat{fill:var(--heat)}
svg .legend{shape-rendering:crispEdges}
svg rect.heat:hover{stroke:var(--ink);stroke-width:1.5}
svg .line{fill:none;stroke-width:1.8;stroke-linejoin:round}
svg .line.other{stroke:var(--before);stroke-width:1;opacity:.6}
svg .line.main{stroke:var(--main)} svg .line.second{stroke:var(--second)}
svg .dot.main{fill:var(--main)} svg .dot.second{fill:var(--second)}
svg .area.main{fill:var(--main);opacity:.13}
svg .touch{fill:transparent}
svg .touch:hover{fill:var(--ink);fill-opacity:.18}
svg .track{fill:var(--track)} svg .before{fill:var(--before)} svg .bar{fill:var(--main)}
.keys{font-size:12.5px;color:var(--soft);margin-bottom:6px}
.outside{margin-top:10px}
.key{display:inline-block;width:10px;height:10px;border-radius:2px;margin:0 5px 0 14px}
.key:first-child{margin-left:0}
.key.before{background:var(--before)} .key.main{background:var(--main)} .key.second{background:var(--second)}
.scroll{overflow-x:auto;margin:0 -24px;padding:0 24px}
.tall{max-height:640px;overflow-y:auto;border-top:1px solid var(--rule);padding:0}
table{border-collapse:collapse;width:100%;font-size:13px;white-space:nowrap}
th,td{padding:6px 8px;text-align:right;border-bottom:1px solid var(--rule)}
th:first-child,td:first-child{text-align:left;padding-left:0}
.tall th:first-child,.tall td:first-child{padding-left:24px}
th:last-child,td:last-child{padding-right:0}
.tall th:last-child,.tall td:last-child{padding-right:24px}
td.words{text-align:left;white-space:normal;min-width:140px}
th{font-weight:600;color:var(--soft);vertical-align:bottom}
th small{display:block;font-weight:400}
.tall th{position:sticky;top:0;background:var(--card);box-shadow:0 1px var(--rule);z-index:1}
th button{font:inherit;color:inherit;background:none;border:0;padding:0;cursor:pointer;text-align:inherit}
th button:hover,th[aria-sort] button{color:var(--ink)}
th[aria-sort=ascending] button:after{content:" ↑"} th[aria-sort=descending] button:after{content:" ↓"}
tbody tr:hover td{background:var(--track)}
td.flag{color:var(--warn);font-weight:600}
code,td:first-child{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;
font-size:12.5px}
.columns{columns:2 320px;column-gap:40px}
.columns>div{break-inside:avoid;padding-bottom:20px}
.facts{display:grid;grid-template-columns:max-content 1fr;gap:4px 18px;margin:0;font-size:13.5px}
.facts dt{color:var(--soft)}
.facts dd{margin:0;overflow-wrap:anywhere}
input{font:inherit;font-size:14px;color:inherit;background:var(--page);border:1px solid var(--rule);border-radius:8px;
padding:6px 12px;width:100%;max-width:340px;margin-bottom:14px}
:focus-visible{outline:2px solid var(--main);outline-offset:2px}
footer{color:var(--faint);font-size:12.5px;margin-top:20px}
@media (max-width:640px){main{padding:24px 12px 48px}section{padding:18px 16px}h1{font-size:24px}
.tiles{padding:0}.tiles .tile,.tiles.thirds .tile{flex-basis:calc(50% - 1px);padding:12px 16px}.tile dd{font-size:20px}
.scroll{margin:0 -16px;padding:0 16px}.tall{padding:0}.tall th:first-child,.tall td:first-child{padding-left:16px}
td:first-child{white-space:normal;overflow-wrap:anywhere;min-width:150px;font-size:11.5px;line-height:1.35}
svg.wide{display:none}svg.narrow{display:block}}
@media print{body{background:none}section{break-inside:avoid}.tall{max-height:none}input{display:none}}
"""

# Cells carry their exact value in data-v; rows sort by it, and by the order of solving where nothing is chosen.
SCRIPT = """
const table=document.getElementById("modules"),body=table.tBodies[0],rows=[...body.rows];
const value=(row,i)=>{const v=row.cells[i].dataset.v;return v===""||isNaN(v)?v:Number(v)};
const compare=(a,b)=>{const n=typeof a==="number",m=typeof b==="number";
if(n!==m)return n?-1:1;return n?a-b:a.localeCompare(b,undefined,{numeric:true})};
table.querySelectorAll("th button").forEach((button,i)=>button.addEventListener("click",()=>{
const th=button.closest("th"),next={descending:"ascending",ascending:null}[th.getAttribute("aria-sort")];
const to=next===undefined?"descending":next;
table.querySelectorAll("th").forEach(h=>h.removeAttribute("aria-sort"));
if(to)th.setAttribute("aria-sort",to);
const sign=to==="descending"?-1:1;
body.append(...(to?[...rows].sort((a,b)=>sign*compare(value(a,i),value(b,i))):rows))}));
const count=document.getElementById("count"),filter=document.getElementById("filter");
filter.hidden=false;
filter.addEventListener("input",()=>{const wanted=filter.value.toLowerCase();let shown=0;
rows.forEach(row=>{const hit=row.textContent.toLowerCase().includes(wanted);row.hidden=!hit;shown+=hit});
count.textContent=shown.toLocaleString("en")+" of "+rows.length.toLocaleString("en")});
"""
