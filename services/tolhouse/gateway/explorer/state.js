// The state of the page, and its form in the address:
// #text=…&tokens=24&scale=1&layers=1,0,1&token=3&layer=1&norms=all
const MAX_TEXT = 8192;
const MAX_COUNT = 256;
const SCALE = [-0.5, 2];
const LAYER_SCALE = [0, 2];
const FRESH = {
  text: "import json\n\ndef load(path):\n    with open(",
  count: 24,
  scale: 1,
  layers: [],
  token: 0,
  layer: 0,
  norms: "all",
};
const state = { ...FRESH };
const isTooLong = text => [...text].length > MAX_TEXT;

function numberIn(text, low, high, fallback) {
  const value = text === null || text.trim() === "" ? NaN : Number(text);
  return Number.isFinite(value) ? clamp(value, low, high) : fallback;
}

/** Returns the state in an address. Missing and malformed fields have their defaults. */
function parseState(hash) {
  const fields = new URLSearchParams(hash.replace(/^#/, ""));
  const whole = (name, low, high) =>
    Math.round(numberIn(fields.get(name), low, high, FRESH[name === "tokens" ? "count" : name]));
  const layers = (fields.get("layers") ?? "")
    .split(",")
    .slice(0, 1024)
    .map(text => numberIn(text, ...LAYER_SCALE, 1));
  return {
    text: fields.get("text") ?? FRESH.text,
    count: whole("tokens", 1, MAX_COUNT),
    scale: numberIn(fields.get("scale"), ...SCALE, 1),
    layers: fields.has("layers") ? layers : [],
    token: whole("token", 0, MAX_TEXT),
    layer: whole("layer", 0, 1023),
    norms: fields.get("norms") === "layer" ? "layer" : "all",
  };
}
function formatState() {
  const fields = new URLSearchParams({ text: state.text });
  if (state.count !== FRESH.count) fields.set("tokens", state.count);
  if (state.scale !== 1) fields.set("scale", state.scale);
  if (state.layers.some(scale => scale !== 1)) fields.set("layers", state.layers.join(","));
  for (const name of ["token", "layer", "norms"])
    if (state[name] !== FRESH[name]) fields.set(name, state[name]);
  return `#${fields}`;
}

let editing = 0; // the timer that ends a burst of edits
function writeAddress(push) {
  const address = formatState();
  if (address === location.hash) return;
  try {
    history[push ? "pushState" : "replaceState"](null, "", address);
  } catch {
    /* browsers limit the rate of these calls; the next edit writes the address */
  }
}
/** Writes the address after an edit. The edits of one burst, such as a typed word, share one entry
    of the browser's history; a moved selection makes none. */
function stateEdited({ step = false } = {}) {
  writeAddress(step || !editing);
  clearTimeout(editing);
  editing = step
    ? 0
    : setTimeout(() => {
        editing = 0;
      }, 1500);
}
const selectionMoved = later(() => writeAddress(false), 200);
