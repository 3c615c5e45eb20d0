// Shows the counters of the workers as sparklines. Polls stop while the tab is hidden.
const POLL_MILLISECONDS = 2000;
const POINTS = 60;
const ROWS = ["from_cache", "from_remote", "from_file", "recomputed"];
const SUMS = ["tokens", ...ROWS, "fetches", "fetch_seconds"];
let before = null;
let polling = 0;
let healthy = -1;

class Sparkline {
  constructor(name, unit, show, top) {
    Object.assign(this, { name, unit, show, top, values: [] });
    this.value = element("strong", {}, "–");
    this.node = element(
      "div",
      "card stat",
      element("h2", {}, name),
      element("p", {}, this.value, element("span", "dim", ` ${unit}`)),
    );
    this.svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    const attributes = { viewBox: "0 0 120 32", preserveAspectRatio: "none", role: "img" };
    for (const pair of Object.entries(attributes)) this.svg.setAttribute(...pair);
    this.area = this.shape("area");
    this.line = this.shape("line");
    this.node.append(this.svg);
  }
  shape(name) {
    const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
    path.setAttribute("class", name);
    this.svg.append(path);
    return path;
  }
  /** Adds a value, or null if there was nothing to measure. */
  add(value) {
    this.values = [...this.values, value].slice(-POINTS);
    const points = this.values.map((v, n) => [n, v]).filter(([, v]) => v !== null);
    const largest = Math.max(...points.map(([, v]) => v));
    const most = this.top ?? Math.max(largest, 1e-9);
    const from = POINTS - this.values.length;
    const at = ([n, v]) =>
      [((from + n) * 120) / (POINTS - 1), 30 - 27 * Math.min(1, v / most)]
        .map(coordinate => coordinate.toFixed(1))
        .join(" ");
    const last = points.at(-1);
    this.value.textContent = last ? this.show(last[1]) : "–";
    const path = points.map(at).join("L");
    const x = point => at(point).split(" ")[0];
    this.line.setAttribute(
      "d",
      points.length ? `M${path}${points.length === 1 ? "h0.1" : ""}` : "M0 30",
    );
    this.area.setAttribute(
      "d",
      points.length > 1 ? `M${x(points[0])} 32L${path}L${x(last)} 32Z` : "M0 32",
    );
    const range = last
      ? `now ${this.show(last[1])}, at most ${this.show(largest)} ${this.unit}`
      : "no data yet";
    this.svg.setAttribute("aria-label", `${this.name}: ${range}`);
  }
}
const LINES = {
  tokens: new Sparkline("Generated tokens", "tokens/s", v => fixed(v, 1)),
  hits: new Sparkline("Row cache hits", "%", v => fixed(v, 1), 100),
  fetch: new Sparkline("Row fetch time", "ms", v => fixed(v, 2)),
};
const workers = element("strong", {}, "–");
const workersUnit = element("span", "dim", " healthy workers");
const load = element("p", "dim small");
$("live").append(
  ...Object.values(LINES).map(line => line.node),
  element(
    "div",
    "card stat",
    element("h2", {}, "Workers"),
    element("p", {}, workers, workersUnit),
    load,
  ),
);

function drawLive(now) {
  // A worker that starts, stops or restarts changes the sums by more than its work.
  if (before && (now.workers !== before.workers || SUMS.some(name => now[name] < before[name])))
    before = null;
  const seconds = before ? now.at - before.at : 0;
  const delta = name => now[name] - before[name];
  if (before) {
    const rows = ROWS.reduce((sum, name) => sum + delta(name), 0);
    LINES.tokens.add(delta("tokens") / seconds);
    LINES.hits.add(rows ? (100 * delta("from_cache")) / rows : null);
    LINES.fetch.add(delta("fetches") ? (1000 * delta("fetch_seconds")) / delta("fetches") : null);
  }
  before = now;
  workers.textContent = now.workers;
  workersUnit.textContent = now.workers === 1 ? " healthy worker" : " healthy workers";
  const share = now.dense_weight_bytes
    ? `Weights: ${fixed((100 * now.weight_bytes) / now.dense_weight_bytes, 0)}% of the dense model.`
    : "";
  load.textContent = `${now.running} running, ${now.waiting} waiting. ${share}`;
  const served = [...now.models, ...now.tables.map(table => `table ${table}`)];
  $("model").textContent = served.join(" · ") || "no worker";
  if ($("memory").textContent === now.memory) return;
  $("memory").textContent = now.memory;
  known.clear();
}
async function poll() {
  clearTimeout(polling);
  if (document.hidden) return;
  try {
    const now = await ask("explore/live");
    drawLive({ ...now, at: performance.now() / 1000 });
    report("live", now.workers ? null : new GatewayError(NO_WORKER, 503));
    const came = now.workers > 0 && healthy === 0;
    const changed = now.workers !== healthy || String(now.absent_layers) !== String(absentLayers);
    healthy = now.workers;
    absentLayers = now.absent_layers;
    if (changed) drawMixer();
    if (came && (failures.has("tokens") || failures.has("completion"))) refresh();
  } catch (error) {
    before = null;
    report("live", error);
    if (error.status === 401) return; // wait for a key
  }
  clearTimeout(polling);
  // Poll again after the reply, so that replies keep their order.
  polling = setTimeout(poll, POLL_MILLISECONDS);
}
document.addEventListener("visibilitychange", () => {
  before = null;
  if (document.hidden) clearTimeout(polling);
  else poll();
});
