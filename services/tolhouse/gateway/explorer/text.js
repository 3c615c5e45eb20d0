// Helpers for elements, visible token text, numbers, and calls to the gateway. All text of tokens
// becomes text nodes.
const $ = id => document.getElementById(id);
const SIGNS = { " ": "␣", "\n": "⏎", "\t": "⇥", "\r": "␍" };
const SHAPELESS = /[\p{Cc}\p{Cf}\p{Zl}\p{Zp}\p{Zs}]/u; // control, format and separator characters
const codeOf = c => `U+${c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}`;

/** Returns an element. `properties` are properties and attributes, or only the class name. */
function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  if (typeof properties === "string") properties = { className: properties };
  for (const [name, value] of Object.entries(properties)) {
    if (name in made && name !== "role") made[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

/** Returns parts of a token's text: [text, whether it stands for a character without a shape]. */
function parts(token) {
  if (/^bytes:(\\x[0-9a-f]{2})+$/.test(token)) return [[token.slice(6), true]];
  if (!token) return [["∅", true]];
  const found = [];
  for (const c of token) {
    const last = found.at(-1);
    const alone = !last && /\p{M}/u.test(c); // a mark without its letter
    const sign = SIGNS[c] ?? (alone || SHAPELESS.test(c) ? codeOf(c) : null);
    if (last && last[1] === Boolean(sign)) last[0] += sign ?? c;
    else found.push([sign ?? c, Boolean(sign)]);
  }
  return found;
}
const visible = token =>
  parts(token)
    .map(([text]) => text)
    .join("");
/** Returns a token's text as an element. With `wrap`, a line ends after each sign of a line end. */
const tokenText = (token, wrap = false) =>
  element(
    "bdi",
    "token-text",
    ...parts(token).map(([text, sign]) =>
      sign ? element("span", "sign", wrap ? text.replaceAll("⏎", "⏎\n") : text) : text,
    ),
  );

const fixed = (value, digits = 2) => value.toFixed(digits).replace("-", "−");
const signed = (value, digits = 2) => (value > 0 ? "+" : "") + fixed(value, digits);
const percent = logprob => `${(100 * Math.exp(logprob)).toFixed(1)}%`;
const capital = text => text[0].toUpperCase() + text.slice(1);
const clamp = (value, low, high) => Math.min(high, Math.max(low, value));

/** Puts one of `items` in the tab order. Arrow keys move between the items. */
function roving(items, current) {
  items.forEach((item, n) => {
    item.tabIndex = n === current ? 0 : -1;
  });
}

class GatewayError extends Error {
  constructor(message, status, retrySeconds = 0) {
    super(message);
    Object.assign(this, { status, retrySeconds });
  }
}
const NO_WORKER =
  "No worker is healthy. Start one with “tolhouse worker CHECKPOINT”, or wait until one is.";
const ADVICE = {
  401: "This gateway requires an API key. Enter one in the field “API key” above.",
  403: "This API key does not allow the request. Enter another one above.",
};

/** Returns the gateway's JSON for a path beside this page. Throws GatewayError on failure. */
async function ask(path, { body, signal } = {}) {
  const headers = { "Content-Type": "application/json" };
  const key = $("key").value.trim();
  if (key) headers.Authorization = `Bearer ${key}`;
  const options = {
    headers,
    signal,
    method: body ? "POST" : "GET",
    body: body && JSON.stringify(body),
  };
  let answer;
  let found;
  try {
    answer = await fetch(new URL(path, document.baseURI), options);
    found = await answer.json().catch(() => null);
  } catch (error) {
    if (signal?.aborted) throw error;
    const message =
      "The gateway does not answer. Check that it is running and that this machine can reach it.";
    throw new GatewayError(message, 0, 5);
  }
  if (answer.ok && found) return found;
  const said =
    found?.error?.message ?? `The gateway answered ${answer.status} ${answer.statusText}`;
  // Some messages end with their code in brackets, which is for programs.
  const sentence = capital(said.replace(/ \([a-z_]+\)$|\.$/, "")) + ".";
  if (/no worker is healthy/.test(said)) throw new GatewayError(NO_WORKER, answer.status, 5);
  const again = [429, 502, 503, 504].includes(answer.status);
  const seconds = again ? Math.max(2, Number(answer.headers.get("Retry-After")) || 5) : 0;
  throw new GatewayError(ADVICE[answer.status] ?? sentence, answer.status, seconds);
}

/** Runs one call of `work` at a time. A new call cancels the previous call, which returns false. */
function latest(work) {
  let running = null;
  const run = async (...given) => {
    running?.abort();
    const mine = (running = new AbortController());
    try {
      await work(mine.signal, ...given);
    } catch (error) {
      if (!mine.signal.aborted) throw error;
    }
    return !mine.signal.aborted;
  };
  run.cancel = () => running?.abort();
  return run;
}
function later(work, milliseconds) {
  let timer;
  return () => {
    clearTimeout(timer);
    timer = setTimeout(work, milliseconds);
  };
}
