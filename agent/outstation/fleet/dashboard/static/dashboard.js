// Live pages: one stream of changes tells a page that it is old; the page then fetches itself and takes over the
// elements marked `data-live`, row by row, so that focus, selection and scrolling stay where they are.
const body = document.body;
const reload = { timer: 0, running: false, again: false };
const MIN_INTERVAL_MS = 1000;

function patch(current, fresh) {
  if (current.isEqualNode(fresh)) return;
  const keyed = [...fresh.children].some(child => child.id);
  const nested = current.children.length && fresh.children.length && current.tagName === fresh.tagName;
  if (nested && (keyed || ["TABLE", "TBODY", "DIV", "UL"].includes(current.tagName))) patchChildren(current, fresh);
  else if (!current.contains(document.activeElement) || current === document.activeElement) current.replaceWith(fresh);
  else patchChildren(current, fresh);
}

function patchChildren(current, fresh) {
  for (const { name, value } of [...fresh.attributes]) if (name !== "open") current.setAttribute(name, value);
  for (const { name } of [...current.attributes]) if (!fresh.hasAttribute(name) && name !== "open") current.removeAttribute(name);
  const known = new Map([...current.children].filter(child => child.id).map(child => [child.id, child]));
  let place = current.firstElementChild;
  for (const child of [...fresh.children]) {
    let match = child.id ? known.get(child.id) : place && !place.id && place.tagName === child.tagName ? place : null;
    if (!match) { current.insertBefore(child, place); continue; }
    if (match !== place) current.insertBefore(match, place); else place = place.nextElementSibling;
    patch(match, child);
  }
  while (place) { const next = place.nextElementSibling; place.remove(); place = next; }
}

const LEAVING_MS = 10000;
let submitted = 0;
addEventListener("submit", () => { submitted = Date.now(); });

async function refresh() {
  if (reload.running) { reload.again = true; return; }
  reload.running = true;
  try {
    const response = await fetch(location.href, { headers: { accept: "text/html" }, cache: "no-store" });
    if (response.redirected && new URL(response.url).pathname === "/login") {
      // After a click on "Sign out" the answer to its form decides where to go.
      if (Date.now() - submitted > LEAVING_MS) location.assign(response.url);
      return;
    }
    const fresh = new DOMParser().parseFromString(await response.text(), "text/html");
    if (document.getElementById("error") && response.ok) { location.reload(); return; }
    if (!response.ok) return;
    for (const element of document.querySelectorAll("[data-live]")) {
      const other = element.id && fresh.getElementById(element.id);
      if (!other) continue;
      if (element.tagName === "DETAILS") other.open = element.open;
      patch(element, other);
    }
    for (const image of document.querySelectorAll("img[data-refresh]")) refreshImage(image);
    if (chart) drawChart();
    tellTimes();
    body.dataset.refreshed = String(Date.now());
  } catch { /* The stream of changes says that the connection is lost. */
  } finally {
    reload.running = false;
    if (reload.again) { reload.again = false; schedule(); }
  }
}

let imageDrawn = Date.now();
function refreshImage(image) {
  // A drift plot changes with each window, and costs more than a page.
  if (Date.now() - imageDrawn < 30000) return;
  imageDrawn = Date.now();
  const stamp = `&at=${imageDrawn}`;
  for (const node of [image, ...image.parentElement.querySelectorAll("source")]) {
    const name = node.tagName === "IMG" ? "src" : "srcset";
    const plain = node.getAttribute(name).replace(/[?&]at=\d+/, "");
    node.setAttribute(name, plain + (plain.includes("?") ? stamp : stamp.replace("&", "?")));
  }
}

function schedule() {
  if (reload.timer || document.hidden) { reload.again = document.hidden || reload.again; return; }
  const since = Date.now() - Number(body.dataset.refreshed || 0);
  reload.timer = setTimeout(() => { reload.timer = 0; refresh(); }, Math.max(50, MIN_INTERVAL_MS - since));
}

function concerns(event) {
  const watch = body.dataset.watch;
  if (!watch) return false;
  return watch === "*" || event.changed.includes("*") || watch.split(" ").some(name => event.changed.includes(name));
}

let unavailable = !document.getElementById("notice").hidden;
function listen() {
  if (!document.querySelector(".who")  && !document.getElementById("error")) return;
  const source = new EventSource("/events");
  source.onopen = () => { document.getElementById("lost").hidden = true; };
  source.onmessage = message => {
    const event = JSON.parse(message.data);
    if (event.problem !== undefined && event.problem !== unavailable) {
      unavailable = event.problem;
      document.getElementById("notice").hidden = !unavailable;
      if (!unavailable) schedule();
    }
    if (event.changed && concerns(event)) schedule();
  };
  source.onerror = () => {
    document.getElementById("lost").hidden = false;
    // An answer that is no stream ends the source for good.
    if (source.readyState === EventSource.CLOSED) setTimeout(() => { listen(); schedule(); }, 3000);
  };
}

const UNITS = [[86400, "d"], [3600, "h"], [60, "min"], [1, "s"]];
function tellTimes() {
  for (const element of document.querySelectorAll("time")) {
    const distance = Math.trunc((Date.now() - Date.parse(element.dateTime)) / 1000);
    const [size, unit] = UNITS.find(([s]) => Math.abs(distance) >= s) || UNITS[3];
    const words = `${Math.trunc(Math.abs(distance) / size)} ${unit}`;
    const text = distance >= 0 ? `${words} ago` : `in ${words}`;
    if (element.textContent !== text) element.textContent = text;
  }
}

// Forms that filter apply themselves; without this script they have a button.
for (const form of document.querySelectorAll("form[data-auto]")) {
  let typing = 0;
  form.addEventListener("submit", () => { for (const field of form.elements) if (field.name && !field.value) field.disabled = true; });
  form.addEventListener("change", event => { if (event.target.type !== "search") form.requestSubmit(); });
  form.addEventListener("input", event => {
    if (event.target.type !== "search") return;
    clearTimeout(typing);
    typing = setTimeout(() => {
      const query = new URLSearchParams([...new FormData(form)].filter(([, value]) => value));
      history.replaceState(null, "", `${form.getAttribute("action")}?${query}`);
      refresh();
    }, 250);
  });
}
for (const button of document.querySelectorAll("button[data-confirm]"))
  button.addEventListener("click", event => { if (!confirm(button.dataset.confirm)) event.preventDefault(); });

let chart = null, points = null;
const holder = document.getElementById("chart");
const dark = matchMedia("(prefers-color-scheme: dark)");
const color = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

async function drawChart() {
  const response = await fetch(holder.dataset.source, { cache: "no-store" }).catch(() => null);
  if (!response || !response.ok) { if (!chart) say("The results cannot be read now; the page tries again by itself."); return; }
  points = await response.json();
  if (!points.t.length) { chart?.destroy(); chart = null; say("No result in this time range.", holder.dataset.all, "Show all results"); return; }
  const series = [{ label: "UTC", value: (_, t) => (t == null ? "–" : clockText(t, 0)) }], data = [points.t];
  // A line across a time without results would look like results.
  const steps = points.t.slice(1).map((t, i) => t - points.t[i]).sort((a, b) => a - b), longest = 10 * (steps[steps.length >> 1] ?? 0);
  const gaps = (plot, _, first, last, nulls) => {
    for (let i = first + 1; i <= last; i++)
      if (longest && points.t[i] - points.t[i - 1] > longest) nulls.push([plot.valToPos(points.t[i - 1], "x", true), plot.valToPos(points.t[i], "x", true)]);
    return nulls.sort((a, b) => a[0] - b[0]);
  };
  const add = (name, values, options) => { if (values) { series.push({ label: name, width: 1.5, points: { size: 5 }, gaps, ...options }); data.push(values); } };
  add("label", points.label, { stroke: color("--series-0"), paths: () => null, points: { show: true, size: 5, fill: color("--series-0") }, scale: "label", value: (_, v) => points.labels[v] ?? "–" });
  add("value", points.value, { stroke: color("--series-0"), scale: "y" });
  add("score", points.score, { stroke: color("--series-1"), scale: "score" });
  const axis = extra => ({ stroke: color("--muted"), grid: { stroke: color("--grid"), width: 1 }, ticks: { stroke: color("--grid") }, ...extra });
  const axes = [axis({ values: (_, ticks, __, ___, step) => ticks.map(t => clockText(t, step)), space: 76 })];
  if (points.label) axes.push(axis({ scale: "label", size: 84, splits: () => points.labels.map((_, i) => i), values: (_, ticks) => ticks.map(i => (points.labels[i] ?? "").slice(0, 12)) }));
  if (points.value) axes.push(axis({ scale: "y", size: 64 }));
  if (points.score) axes.push(axis({ scale: "score", side: 1, grid: { show: false }, size: 48 }));
  const scales = { label: { range: [-0.5, points.labels.length - 0.5] }, score: { range: (_, low, high) => [Math.min(0, low), Math.max(1, high)] } };
  const signature = series.map(s => s.label).join() + points.labels.join() + dark.matches;
  if (chart && chart.signature === signature) { chart.setData(data); return; }
  chart?.destroy();
  holder.replaceChildren();
  chart = new uPlot({ width: holder.clientWidth, height: 240, series, axes, scales, tzDate: t => uPlot.tzDate(new Date(t * 1e3), "Etc/UTC"), cursor: { drag: { x: true, y: false } } }, data, holder);
  chart.signature = signature;
  if (points.sampled) { const note = document.createElement("p"); note.className = "muted small"; note.textContent = `${points.t.length} of more results, at even distances`; holder.append(note); }
  chart.over.addEventListener("dblclick", () => { const i = chart.cursor.idx; if (i !== null && i !== undefined) location.assign(points.paths[i]); });
}

function clockText(t, step) {
  const text = new Date(t * 1e3).toISOString();
  if (step >= 86400 || t % 86400 === 0) return text.slice(0, 10);
  return step >= 60 ? text.slice(11, 16) : step > 0 ? text.slice(11, 19) : text.slice(0, 19).replace("T", " ");
}

function say(text, href, name) {
  const line = document.createElement("p");
  line.className = "muted";
  line.textContent = `${text} `;
  if (href) { const link = document.createElement("a"); link.href = href; link.textContent = name; line.append(link); }
  holder.replaceChildren(line);
}

if (holder) {
  drawChart();
  new ResizeObserver(() => chart?.setSize({ width: holder.clientWidth, height: 240 })).observe(holder);
  dark.addEventListener("change", drawChart);
}
document.addEventListener("visibilitychange", () => { if (!document.hidden && reload.again) { reload.again = false; schedule(); } });
tellTimes();
setInterval(tellTimes, 10000);
listen();
