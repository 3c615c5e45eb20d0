// The controls for the scales of the memory, and both completions with changes of log probabilities.
let absentLayers = [];
let compared = null;
const STRONGEST = 3; // nats; larger changes have the same colour
const isAbsent = layer => absentLayers.includes(layer);
const scaleOf = layer => (isAbsent(layer) ? 0 : (state.layers[layer] ?? 1));
const change = token => token.logprobs[1] - token.logprobs[0];

function drawMixer() {
  const rows = [
    mixerRow("All layers", SCALE, state.scale, scale => {
      state.scale = scale;
    }),
  ];
  for (let layer = 0; layer < numLayers && numLayers > 1; layer++) {
    const set = scale => {
      state.layers = Array.from({ length: numLayers }, (_, l) =>
        l === layer ? scale : (state.layers[l] ?? 1),
      );
    };
    rows.push(mixerRow(`Layer ${layer}`, LAYER_SCALE, scaleOf(layer), set, isAbsent(layer)));
  }
  const controls = () => [...$("mixer").querySelectorAll("button, input")];
  const focused = controls().indexOf(document.activeElement);
  const reason =
    healthy > 0
      ? "The served model has no memory rows to scale."
      : "The scales appear here when the gateway has described the model.";
  $("mixer").replaceChildren(...(numLayers ? rows : [element("p", "empty", reason)]));
  controls()[focused]?.focus();
}
/** Returns a name that turns the rows off and on, a slider, and the scale as text. */
function mixerRow(name, [low, high], value, set, missing = false) {
  const toggle = element(
    "button",
    {
      type: "button",
      className: "toggle",
      disabled: missing,
      title: "Turn these rows off or on",
    },
    name,
  );
  const output = element("output");
  const slider = element("input", {
    type: "range",
    min: low,
    max: high,
    step: 0.05,
    value,
    disabled: missing,
    ariaLabel: `Scale of ${name.toLowerCase()}`,
  });
  const row = element("div", "scale", toggle, slider, output);
  const show = scale => {
    output.textContent = missing ? "not in table" : scale === 0 ? "absent" : fixed(scale);
    toggle.setAttribute("aria-pressed", scale !== 0);
    row.classList.toggle("off", scale === 0);
    row.classList.toggle("altered", scale !== 1 && !missing);
  };
  const use = scale => {
    set(scale);
    show(scale);
    stateEdited();
    completeSoon();
  };
  slider.oninput = () => use(Number(slider.value));
  toggle.onclick = () => {
    slider.value = Number(slider.value) === 0 ? 1 : 0;
    slider.oninput();
  };
  show(value);
  return row;
}
const complete = latest(async signal => {
  if (!state.text) {
    clearCompletions("Type a text above to complete it.");
    return;
  }
  if (isTooLong(state.text)) {
    clearCompletions("The completion is not available."); // the error of the tokens has the reason
    return;
  }
  const layer_scales = Array.from({ length: numLayers > 1 ? numLayers : 0 }, (_, layer) =>
    isAbsent(layer) ? 1 : (state.layers[layer] ?? 1),
  );
  const body = {
    text: state.text,
    max_tokens: state.count,
    row_scale: numLayers ? state.scale : 1,
    layer_scales,
  };
  compared = await ask("explore/compare", { body, signal });
  drawCompletions();
});
/** Clears the completions, which belong to another text or to other settings. */
function clearCompletions(reason = "") {
  compared = null;
  for (const side of ["original", "changed"]) {
    $(side).removeAttribute("aria-busy");
    $(side).replaceChildren(...(reason ? [element("p", "empty", reason)] : []));
  }
  $("odds").parentElement.hidden = true;
  for (const part of ["odds", "verdict", "position", "change-legend"]) $(part).replaceChildren();
}
const firstDifference = () => {
  const [a, b] = [compared.original.tokens, compared.changed.tokens];
  const at = a.findIndex((token, n) => token.id !== b[n]?.id);
  return at < 0 && b.length > a.length ? a.length : at;
};
function tint(node, token) {
  const strength = clamp(Math.abs(change(token)) / STRONGEST, 0, 1);
  const name = change(token) < 0 ? "--less" : "--more";
  const part = `${(78 * strength).toFixed(0)}%`;
  node.style.backgroundColor = `color-mix(in oklab, var(${name}) ${part}, transparent)`;
}
function drawCompletions() {
  const split = firstDifference();
  for (const side of ["original", "changed"]) drawSide(side, split);
  drawVerdict(split);
  drawOdds(split);
  const bar = element("span", { className: "bar changes", ariaHidden: "true" });
  const ends = [`−${STRONGEST} nats, less likely`, `more likely, +${STRONGEST}`];
  const sample = element("span", "piece differs", "after the first difference");
  $("change-legend").replaceChildren(ends[0], bar, ends[1], split < 0 ? "" : sample);
  $("position").textContent = "Select a token to compare its probabilities.";
}
function drawSide(side, split) {
  const { tokens: list, finish_reason: reason } = compared[side];
  const box = $(side);
  const choose = n => {
    roving(nodes, n);
    nodes.forEach((node, at) => node.setAttribute("aria-selected", at === n));
    drawPosition(side, n);
  };
  const nodes = list.map((token, n) => {
    const node = element(
      "span",
      { role: "option", className: "piece" },
      tokenText(token.token, true),
    );
    tint(node, token);
    node.classList.toggle("differs", split >= 0 && n >= split);
    const scores = token.logprobs.map(p => fixed(p, 3)).join(" → ");
    const text = visible(token.token);
    node.title = `${text}: log probability ${scores}, change ${signed(change(token))}`;
    node.setAttribute("aria-label", node.title);
    node.onfocus = () => choose(n);
    return node;
  });
  box.onkeydown = event => {
    const at = nodes.indexOf(event.target);
    const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: nodes.length - 1 }[event.key];
    if (at < 0 || !nodes[to]) return;
    event.preventDefault();
    nodes[to].focus();
  };
  roving(nodes, 0);
  box.replaceChildren(...nodes);
  if (reason === "stop") box.append(element("span", "dim end", "end of the text"));
  box.removeAttribute("aria-busy");
}
function drawPosition(side, n) {
  const token = compared[side].tokens[n];
  const [plain, changed] = token.logprobs;
  const listed = list =>
    list.map(({ token: text, logprob }) => `${visible(text)} ${percent(logprob)}`).join(", ");
  const scores =
    `${percent(plain)} with the original memory, ` +
    `${percent(changed)} with your settings (${signed(change(token))} nats).`;
  $("position").replaceChildren(
    `Token ${n + 1}, `,
    tokenText(token.token),
    `: ${scores}`,
    element("br"),
    `Likeliest: ${listed(token.likeliest[0])} | with your settings: ${listed(token.likeliest[1])}`,
  );
}
function drawVerdict(split) {
  const { original, changed } = compared;
  const unchanged = original.tokens.every(token => token.logprobs[0] === token.logprobs[1]);
  const mean =
    original.tokens.reduce((sum, token) => sum + change(token), 0) /
    Math.max(1, original.tokens.length);
  const nats = `${signed(mean)} nats per token`;
  const by = `Your settings change the log probability of the original text by ${nats}.`;
  const texts =
    split < 0
      ? "Both completions are the same."
      : `The completions differ from token ${split + 1} on.`;
  const advice = "The memory is unchanged. Move a slider, turn a layer off, or choose an example.";
  $("verdict").textContent =
    unchanged && original.text === changed.text ? advice : `${texts} ${by}`;
}
function drawOdds(split) {
  const table = element("table");
  const scores = ["log p", "change"];
  const head = ["Token", "Original memory", ...scores, "Your settings", ...scores, "Remark"];
  table
    .createTHead()
    .insertRow()
    .append(
      ...head.map(name =>
        element("th", { scope: "col", className: scores.includes(name) ? "number" : "" }, name),
      ),
    );
  const body = table.createTBody();
  const sides = [
    [compared.original.tokens, 0],
    [compared.changed.tokens, 1],
  ];
  for (let n = 0; n < Math.max(...sides.map(([list]) => list.length)); n++) {
    const line = body.insertRow();
    const cell = (text, name = "number") => element("td", name, text);
    line.append(cell(String(n + 1)));
    for (const [list, own] of sides) {
      const token = list[n];
      const score = cell(token ? signed(change(token), 3) : "");
      if (token) tint(score, token);
      line.append(
        token ? cell(tokenText(token.token), "") : cell(""),
        cell(token ? fixed(token.logprobs[own], 3) : ""),
        score,
      );
    }
    line.append(cell(n === split ? "first difference" : "", "dim"));
    line.classList.toggle("first", n === split);
  }
  $("odds").parentElement.hidden = false;
  $("odds").replaceChildren(table);
}
