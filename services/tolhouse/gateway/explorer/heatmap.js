// The heat map, and the details of its selected cell. Each token is a column with a cell for each
// layer. The columns wrap like text.
let tokens = [];
let numLayers = 0;
let peeked = null; // the id of another token than the selected one, if the details show it
const SHADES = 24;
const known = new Map(); // details by token id
const map = $("map");
const tip = $("tip");
const cursor = element("div", { className: "cursor", ariaHidden: "true" });
const columns = () => [...map.querySelectorAll(".column")];
const cellHeight = () => (numLayers <= 8 ? 24 : numLayers <= 16 ? 14 : 8);
const layerName = layer => (numLayers > 1 ? `layer ${layer}` : "all layers");

for (let n = 0; n < SHADES; n++) {
  // CSS variables, so that the colours follow the theme
  const share = n / (SHADES - 1);
  const [from, to] = share < 0.5 ? ["low", "middle"] : ["middle", "high"];
  const part = 100 * (share < 0.5 ? 2 * share : 2 * share - 1);
  map.parentElement.style.setProperty(
    `--shade${n}`,
    `color-mix(in oklab, var(--${to}) ${part.toFixed(1)}%, var(--${from}))`,
  );
}
/** Returns for each layer the norms with the first and the last shade. */
function normRanges() {
  const rows = tokens.filter(token => token.norms);
  const of = (list, layer) => list.map(token => token.norms[layer]);
  const ranges = Array.from({ length: numLayers }, (_, layer) => of(rows, layer)).map(norms => [
    norms.reduce((a, b) => Math.min(a, b), Infinity),
    norms.reduce((a, b) => Math.max(a, b), -Infinity),
  ]);
  if (state.norms === "layer") return ranges;
  const all = [Math.min(...ranges.map(r => r[0])), Math.max(...ranges.map(r => r[1]))];
  return ranges.map(() => all);
}
function drawMap() {
  const ranges = normRanges();
  const height = cellHeight();
  const colored = numLayers > 0 && tokens.some(token => token.norms);
  map.style.setProperty("--cells", `${colored ? numLayers * height : 0}px`);
  const shade = (norm, [low, high]) =>
    Math.round((SHADES - 1) * (high > low ? (norm - low) / (high - low) : 1));
  const drawn = tokens.map((token, n) => {
    const column = element(
      "button",
      { type: "button", className: "column" },
      tokenText(token.token),
    );
    const cells = element("span", "cells");
    if (colored && token.norms) {
      const stops = token.norms.map((norm, layer) => {
        const at = layer * height;
        const color = `var(--shade${shade(norm, ranges[layer])})`;
        return `${color} ${at}px ${at + height - 1}px, transparent 0 ${at + height}px`;
      });
      cells.style.backgroundImage = `linear-gradient(${stops.join(", ")})`;
    }
    column.append(cells);
    column.dataset.token = n;
    column.tabIndex = -1;
    column.setAttribute("aria-pressed", "false");
    column.setAttribute("aria-label", `${visible(token.token)}, id ${token.id}`);
    return column;
  });
  const advice = state.text
    ? "The tokens of this text are not available."
    : "Type a text above to see its tokens.";
  const empty = element("p", "empty", advice);
  const focused = map.contains(document.activeElement);
  map.replaceChildren(...(tokens.length ? [...drawn, cursor] : [empty]));
  $("map-help").hidden = !tokens.length;
  drawLegend(colored, ranges);
  placeLabels();
  drawSelection();
  if (focused) columns()[state.token]?.focus();
}
function drawLegend(colored, ranges) {
  $("map-legend").replaceChildren();
  if (!colored) return;
  const bar = element("span", { className: "bar", ariaHidden: "true" });
  const shades = Array.from({ length: SHADES }, (_, n) => `var(--shade${n})`);
  bar.style.backgroundImage = `linear-gradient(90deg, ${shades.join(", ")})`;
  const ends =
    state.norms === "layer"
      ? ["smallest norm of its layer", "largest"]
      : ranges[0].map(norm => fixed(norm, 1));
  $("map-legend").append(...(state.norms === "layer" ? [] : ["norm "]), ends[0], bar, ends[1]);
}
/** Writes the numbers of the layers beside each line of columns, after the browser's wrapping. */
function placeLabels() {
  map.querySelectorAll(".layer").forEach(label => label.remove());
  const height = cellHeight();
  const every = height < 12 ? 4 : 1;
  const lines = new Map(columns().map(column => [column.offsetTop, column]));
  for (const column of numLayers > 1 && tokens.some(token => token.norms) ? lines.values() : []) {
    const top = column.lastChild.offsetTop;
    for (let layer = 0; layer < numLayers; layer += every) {
      const label = element("span", { className: "layer", ariaHidden: "true" }, String(layer));
      label.style.top = `${top + layer * height}px`;
      label.style.lineHeight = `${Math.max(height, 12)}px`;
      map.append(label);
    }
  }
  placeCursor();
}
function placeCursor() {
  const column = columns()[state.token];
  cursor.hidden = !column || !tokens[state.token]?.norms;
  if (cursor.hidden) return;
  const height = cellHeight();
  const cells = column.lastChild;
  Object.assign(cursor.style, {
    left: `${column.offsetLeft}px`,
    top: `${cells.offsetTop + state.layer * height}px`,
    width: `${column.offsetWidth}px`,
    height: `${height - 1}px`,
  });
}
function describeCell(n, layer) {
  const { token, id, norms } = tokens[n];
  const norm = norms ? `, ${layerName(layer)}, norm ${fixed(norms[layer])}` : "";
  return `${visible(token)}, id ${id}${norm}`;
}
function drawSelection() {
  const before = map.querySelector("[aria-pressed=true]");
  before?.setAttribute("aria-pressed", "false");
  if (before) before.tabIndex = -1;
  if (tokens.length) {
    state.token = clamp(state.token, 0, tokens.length - 1);
    state.layer = clamp(state.layer, 0, Math.max(0, numLayers - 1));
    const column = columns()[state.token];
    column.tabIndex = 0;
    column.setAttribute("aria-pressed", "true");
    column.setAttribute("aria-label", describeCell(state.token, state.layer));
  }
  placeCursor();
  drawDetail();
}
function select(token, layer) {
  peeked = null;
  Object.assign(state, {
    token: clamp(token, 0, tokens.length - 1),
    layer: clamp(layer, 0, Math.max(0, numLayers - 1)),
  });
  drawSelection();
  columns()[state.token]?.focus();
  $("cell").textContent = describeCell(state.token, state.layer);
  selectionMoved();
}
map.addEventListener("keydown", event => {
  const { token, layer } = state;
  const last = tokens.length - 1;
  const to = {
    ArrowRight: [token + 1, layer],
    ArrowLeft: [token - 1, layer],
    ArrowDown: [token, layer + 1],
    ArrowUp: [token, layer - 1],
    Home: [0, layer],
    End: [last, layer],
    PageUp: [token, 0],
    PageDown: [token, numLayers - 1],
  }[event.key];
  if (!to || !tokens.length || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  select(...to);
});
/** Returns the token and the layer under the pointer. The text of a token has no layer. */
function cellAt(event) {
  const column = event.target.closest?.(".column");
  if (!column) return null;
  const y = event.clientY - column.lastChild.getBoundingClientRect().top;
  return {
    token: Number(column.dataset.token),
    layer: y < 0 ? null : clamp(Math.floor(y / cellHeight()), 0, Math.max(0, numLayers - 1)),
  };
}
map.addEventListener("click", event => {
  const cell = cellAt(event);
  if (cell) select(cell.token, event.detail && cell.layer !== null ? cell.layer : state.layer);
});
map.addEventListener("pointermove", event => {
  const cell = event.pointerType === "touch" ? null : cellAt(event);
  const token = cell && tokens[cell.token];
  tip.hidden = !token;
  if (!token) return;
  const norm =
    token.norms && cell.layer !== null
      ? `${capital(layerName(cell.layer))} · norm ${fixed(token.norms[cell.layer])}`
      : "";
  tip.replaceChildren(
    element("strong", {}, tokenText(token.token)),
    ` id ${token.id}`,
    element("br"),
    norm,
  );
  tip.style.left = `${clamp(event.clientX + 14, 0, innerWidth - tip.offsetWidth - 8)}px`;
  tip.style.top = `${clamp(event.clientY + 18, 0, innerHeight - tip.offsetHeight - 8)}px`;
});
map.addEventListener("pointerleave", () => {
  tip.hidden = true;
});
new ResizeObserver(placeLabels).observe(map);

const fetchDetail = latest(async (signal, id) => {
  await new Promise(resolve => {
    setTimeout(resolve, 60);
  }); // because a held arrow key passes many tokens
  signal.throwIfAborted();
  known.set(id, await ask(`explore/tokens/${id}`, { signal }));
  drawDetail();
});
function drawDetail() {
  const selected = tokens[state.token];
  const id = peeked ?? selected?.id;
  if (id === undefined) {
    $("detail").replaceChildren(
      element("p", "empty", "Select a cell of the heat map to see its keys and nearest tokens."),
    );
    return;
  }
  const found = known.get(id);
  const shown = found ?? (peeked === null ? selected : null);
  const focused = $("detail").contains(document.activeElement);
  if (shown) $("detail").replaceChildren(...detailOf(shown, found));
  if (shown && focused) $("detail").querySelector("h2").focus();
  if (found) {
    fetchDetail.cancel(); // its answer would redraw the panel and move the focus
    report("detail");
  } else if (peeked !== null || selected.norms) {
    fetchDetail(id).catch(error => report("detail", error, drawDetail));
  }
}
function detailOf(shown, found) {
  const about = [
    element("h2", { tabIndex: -1 }, tokenText(shown.token)),
    element("p", "dim", `Token id ${shown.id}`),
  ];
  if (peeked !== null) {
    const back = element("button", {
      type: "button",
      className: "back",
      onclick: () => select(state.token, state.layer),
    });
    back.append("Back to ", tokenText(tokens[state.token]?.token ?? ""));
    about.push(back);
  }
  if (!shown.norms)
    return [...about, element("p", "empty", "This gateway has no memory data for the token.")];
  const layer = clamp(state.layer, 0, shown.norms.length - 1);
  const most = Math.max(...shown.norms, 1e-9);
  const bars = element(
    "div",
    "bars",
    ...shown.norms.map((norm, l) => {
      const fill = element("span", "fill");
      const row = element("div", l === layer ? "now" : "");
      fill.style.width = `${(100 * norm) / most}%`;
      row.onclick = () => {
        state.layer = l;
        drawSelection();
        selectionMoved();
      };
      row.append(
        element("span", {}, numLayers > 1 ? `Layer ${l}` : "All"),
        element("span", "track", fill),
        element("span", "number", fixed(norm)),
      );
      return row;
    }),
  );
  about.push(element("h3", {}, "Row norm by layer"), bars);
  if (!found) return about;
  const share = fixed(found.percentiles[layer], 1);
  about.push(
    element(
      "p",
      "dim",
      `${capital(layerName(layer))}: a larger norm than ${share}% of the vocabulary.`,
    ),
  );
  about.push(element("h3", {}, `Strongest keys, ${layerName(layer)}`));
  for (const { key, coefficient, shared_by: sharers } of found.keys[layer]) {
    const line = element("div", "key", element("span", "number", `#${key}`));
    line.append(
      element("span", { className: "number", title: "coefficient" }, signed(coefficient)),
      element("span", "chips", ...sharers.map(chip)),
    );
    about.push(line);
  }
  about.push(
    element("p", "dim hint", "Key, coefficient, and the tokens with the largest coefficients."),
  );
  const near = found.nearest.map(token =>
    element("span", "near", chip(token), element("span", "number", fixed(token.cosine))),
  );
  return [
    ...about,
    element("h3", {}, "Nearest tokens by cosine"),
    element("div", "chips", ...near),
  ];
}
/** Returns a button that shows the details of another token. */
function chip({ id, token }) {
  const made = element(
    "button",
    { type: "button", className: "chip", title: `id ${id}` },
    tokenText(token),
  );
  made.onclick = () => {
    peeked = id;
    drawDetail();
    $("cell").textContent = `${visible(token)}, id ${id}`;
  };
  return made;
}
const readTokens = latest(async signal => {
  if (isTooLong(state.text)) {
    throw new GatewayError(
      `The text has ${[...state.text].length} characters. Shorten it to at most ${MAX_TEXT}.`,
      400,
    );
  }
  const found = await ask("explore/tokens", { body: { text: state.text }, signal });
  tokens = found.tokens;
  numLayers = found.layers || (tokens[0]?.norms?.length ?? 0);
  peeked = null;
  drawMap();
  drawMixer();
});
