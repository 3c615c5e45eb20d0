// The `openai` package: chats, completions, streams, errors.

import assert from "node:assert/strict";
import OpenAI from "openai";
import { OVERLONG, SYSTEM } from "./system.mjs";

export const PACKAGE = "openai";
const HELLO = [{ role: "user", content: "hello" }];
const COMMON = { model: SYSTEM.model, temperature: 0, max_tokens: 8 };

const client = new OpenAI({ baseURL: SYSTEM.url, apiKey: "none", maxRetries: 0 });
const keyed = (apiKey) => new OpenAI({ baseURL: SYSTEM.keyed_url, apiKey, maxRetries: 0 });

const chat = (messages = HELLO, options = {}) =>
  client.chat.completions.create({ messages, ...COMMON, ...options });
const complete = (prompt = SYSTEM.greedy.prompt, options = {}) =>
  client.completions.create({ prompt, ...COMMON, ...options });

async function all(stream) {
  const chunks = [];
  for await (const chunk of await stream) chunks.push(chunk);
  return chunks;
}

export const checks = {
  "A completion is the model's, with usage": async () => {
    const answer = await complete(undefined, { max_tokens: SYSTEM.greedy.max_tokens });
    assert.equal(answer.choices[0].text, SYSTEM.greedy.text);
    assert.equal(answer.usage.prompt_tokens, SYSTEM.greedy.ids.length);
    assert.equal(answer.object, "text_completion");
  },

  "The chunks of a completion add up to the plain answer": async () => {
    const plain = await complete();
    const chunks = await all(complete(undefined, { stream: true }));
    assert.equal(chunks.map((chunk) => chunk.choices[0].text).join(""), plain.choices[0].text);
  },

  "The role of a chat's stream comes first, and usage last": async () => {
    const plain = await chat();
    const options = { stream: true, stream_options: { include_usage: true } };
    const chunks = await all(chat(HELLO, options));
    const last = chunks.pop();
    const deltas = chunks.map((chunk) => chunk.choices[0].delta);
    assert.equal(deltas[0].role, "assistant");
    assert.equal(deltas.map((d) => d.content ?? "").join(""), plain.choices[0].message.content);
    assert.deepEqual(last.choices, []);
    assert.deepEqual(last.usage, plain.usage);
  },

  "The stream helper gives the whole message": async () => {
    const stream = client.chat.completions.stream({ messages: HELLO, ...COMMON });
    const message = await stream.finalMessage();
    assert.equal(message.content, (await chat()).choices[0].message.content);
  },

  "The answer's message is taken as history": async () => {
    const messages = [...HELLO];
    for (const text of ["more", "and more"]) {
      messages.push((await chat(messages)).choices[0].message, { role: "user", content: text });
    }
    const streamed = await client.chat.completions.stream({ messages, ...COMMON }).finalMessage();
    await chat([...messages, streamed, { role: "user", content: "again" }]);
  },

  "A stream may be aborted; the next request is answered": async () => {
    const stream = await complete("import", { stream: true, max_tokens: 300, ignore_eos: true });
    for await (const _ of stream) break;
    await complete();
  },

  "Models are listed and found by name": async () => {
    const models = await all(client.models.list());
    assert.deepEqual(models.map((model) => model.id), [SYSTEM.model]);
    assert.equal((await client.models.retrieve(SYSTEM.model)).id, SYSTEM.model);
  },

  "Errors have the classes and codes of OpenAI's": async () => {
    const code = (expected) => (error) => error.code === expected;
    await assert.rejects(chat(HELLO, { model: "nothing" }), OpenAI.NotFoundError);
    await assert.rejects(chat(HELLO, { model: "nothing" }), code("model_not_found"));
    await assert.rejects(complete(OVERLONG), OpenAI.BadRequestError);
    await assert.rejects(complete(OVERLONG), code("context_length_exceeded"));
    await assert.rejects(keyed("wrong").models.list(), OpenAI.AuthenticationError);
    await assert.rejects(keyed("wrong").models.list(), code("invalid_api_key"));
    assert.ok((await keyed(SYSTEM.key).models.list()).data.length);
    await assert.rejects(chat(HELLO, { temperature: -1 }), (error) => error.param === "temperature");
    await assert.rejects(client.responses.create({ model: SYSTEM.model, input: "hello" }), OpenAI.NotFoundError);
  },

  "A key over its limit is a RateLimitError": async () => {
    const limited = keyed(SYSTEM.limited_key);
    const asked = [1, 2, 3].map(() => limited.models.list());
    const answers = await Promise.allSettled(asked);
    const refused = answers.filter((answer) => answer.status === "rejected");
    assert.ok(refused.length >= 2);
    for (const { reason } of refused) assert.ok(reason instanceof OpenAI.RateLimitError);
  },

  "A request that takes longer than its timeout is an APIConnectionTimeoutError": async () => {
    const body = { ...COMMON, prompt: "import", max_tokens: 300, n: 4, ignore_eos: true };
    const asked = client.completions.create(body, { timeout: 50 });
    await assert.rejects(asked, OpenAI.APIConnectionTimeoutError);
  },

  "Tools and structured output are refused by name": async () => {
    const tool = { type: "function", function: { name: "f", parameters: { type: "object" } } };
    const named = (param) => (error) => error.status === 400 && error.param === param;
    await assert.rejects(chat(HELLO, { tools: [tool] }), named("tools"));
    const format = { type: "json_object" };
    await assert.rejects(chat(HELLO, { response_format: format }), named("response_format"));
    await chat(HELLO, { tools: [], tool_choice: "none", response_format: { type: "text" } });
  },
};
