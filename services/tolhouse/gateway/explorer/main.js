// Controls, examples, errors and the theme.
const EXAMPLES = [
  { name: "Full memory", text: FRESH.text },
  { name: "No layer 0", text: "try:\n    import json\nexcept", layers: [0] },
  {
    name: "No layer 1",
    text: 'with open(path, encoding="utf-8") as file:\n    data =',
    layers: [1, 0],
  },
  { name: "Half memory", text: "for name in sorted(os.listdir(path)):\n    print(", scale: 0.5 },
  { name: "Memory × 1.5", text: 'def read_file(path):\n    """', scale: 1.5 },
  { name: "Memory × −0.5", text: "for key, value in options.items():\n    if", scale: -0.5 },
  { name: "No memory", text: "class Config:\n    def __init__(self, path):\n", scale: 0 },
  { name: "Bytes and tabs", text: '# naïve café, π ≈ 3.14\nif x:\n\ty = "Ünï→"' },
];
const failures = new Map(); // by part of the page: the error, and the timer of the next attempt

/** Shows or clears the error of a part of the page, and schedules the next attempt. */
function report(about, error = null, again = null) {
  if (error && !(error instanceof GatewayError)) throw error; // a defect of this page
  clearTimeout(failures.get(about)?.timer);
  failures.delete(about);
  if (error) {
    const timer = again && error.retrySeconds ? setTimeout(again, 1000 * error.retrySeconds) : 0;
    failures.set(about, { error, timer });
  }
  const sentences = [...failures.values()].map(({ error: { message }, timer }) =>
    timer ? `${message} The page tries again by itself.` : message,
  );
  const isPart = text => sentences.some(other => other !== text && other.startsWith(text));
  const distinct = [...new Set(sentences)].filter(text => !isPart(text));
  if ($("errors").textContent !== distinct.join(""))
    $("errors").replaceChildren(...distinct.map(text => element("p", {}, text)));
  $("key-field").classList.toggle(
    "wanted",
    [...failures.values()].some(({ error: { status } }) => status === 401),
  );
}
async function showTokens() {
  try {
    if (!(await readTokens())) return false;
    report("tokens");
  } catch (error) {
    tokens = [];
    drawMap();
    report("tokens", error, refresh);
  }
  return true;
}
function showBusy() {
  $("status").textContent = "Completing …";
  for (const side of ["original", "changed"]) $(side).setAttribute("aria-busy", "true");
}
async function showCompletions() {
  showBusy();
  try {
    if (!(await complete())) return;
    report("completion");
    $("status").textContent = tokens.length === 1 ? "1 token" : `${tokens.length} tokens`;
  } catch (error) {
    clearCompletions("The completion is not available.");
    report("completion", error, showCompletions);
    $("status").textContent = "";
  }
}
async function refresh() {
  complete.cancel();
  showBusy();
  if (await showTokens()) await showCompletions(); // completions need the number of layers
}
const refreshLater = later(refresh, 300);
const completeLater = later(showCompletions, 150);
const refreshSoon = () => {
  readTokens.cancel();
  complete.cancel();
  showBusy();
  refreshLater();
};
const completeSoon = () => {
  complete.cancel();
  showBusy();
  completeLater();
};

function applyState() {
  if ($("prompt").value !== state.text) $("prompt").value = state.text;
  $("count").value = state.count;
  $("norms").value = state.norms;
  drawMixer();
  refresh();
}
function loadAddress() {
  Object.assign(state, parseState(location.hash));
  applyState();
}
function loadExample({ text, scale = 1, layers = [] }) {
  Object.assign(state, { ...FRESH, norms: state.norms, text, scale, layers });
  stateEdited({ step: true });
  applyState();
}
$("examples").append(
  ...EXAMPLES.map(example => {
    const first = element("span", "code", example.text.split("\n")[0]);
    return element(
      "button",
      { type: "button", className: "example", onclick: () => loadExample(example) },
      example.name,
      first,
    );
  }),
);

$("prompt").oninput = () => {
  Object.assign(state, { text: $("prompt").value, token: 0 });
  stateEdited();
  refreshSoon();
};
$("count").oninput = () => {
  state.count = Math.round(numberIn($("count").value, 1, MAX_COUNT, FRESH.count));
  stateEdited();
  completeSoon();
};
$("count").onchange = () => {
  $("count").value = state.count;
};
$("norms").onchange = () => {
  state.norms = $("norms").value;
  stateEdited({ step: true });
  drawMap();
};
$("reset").onclick = () => {
  Object.assign(state, { scale: 1, layers: [] });
  stateEdited({ step: true });
  drawMixer();
  showCompletions();
};
$("key").onchange = () => {
  known.clear();
  refresh();
  poll();
};
addEventListener("popstate", loadAddress);

$("copy").onclick = async () => {
  writeAddress(false);
  let copied = true;
  try {
    await navigator.clipboard.writeText(location.href);
  } catch {
    // only secure pages can use the clipboard
    const field = element("textarea", {
      value: location.href,
      readOnly: true,
      className: "unseen",
    });
    document.body.append(field);
    field.select();
    copied = document.execCommand("copy");
    field.remove();
    $("copy").focus();
  }
  $("status").textContent = copied
    ? "The link is copied."
    : "The browser refused the copy. The address bar has the link.";
};
const THEMES = ["auto", "light", "dark"];
const root = document.documentElement;
const theme = () => root.dataset.theme ?? "auto";
function nameTheme() {
  $("theme").textContent = `Theme: ${theme()}`;
}
$("theme").onclick = () => {
  const next = THEMES[(THEMES.indexOf(theme()) + 1) % THEMES.length];
  if (next === "auto") delete root.dataset.theme;
  else root.dataset.theme = next;
  try {
    localStorage.setItem("tolhouse-theme", next);
  } catch {
    /* without storage, the theme lasts until the page closes */
  }
  nameTheme();
};
nameTheme();
loadAddress();
poll();
