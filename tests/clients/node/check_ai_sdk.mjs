// Vercel's AI SDK, by @ai-sdk/openai-compatible.

import assert from "node:assert/strict";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { APICallError, generateText, streamText } from "ai";
import { OVERLONG, SYSTEM } from "./system.mjs";

export const PACKAGE = "@ai-sdk/openai-compatible";
const provider = createOpenAICompatible({ name: "tolhouse", baseURL: SYSTEM.url, includeUsage: true });
const COMMON = { temperature: 0, maxOutputTokens: 8, maxRetries: 0 };
const chat = { model: provider.chatModel(SYSTEM.model), ...COMMON };
const completion = { model: provider.completionModel(SYSTEM.model), ...COMMON };

export const checks = {
  "generateText gives text, usage and the finish reason": async () => {
    const answer = await generateText({ ...chat, prompt: "hello" });
    assert.equal(typeof answer.text, "string");
    assert.ok(answer.usage.inputTokens > 0 && answer.usage.outputTokens > 0);
    assert.ok(["stop", "length"].includes(answer.finishReason));
    assert.equal(answer.response.modelId, SYSTEM.model);
  },

  "streamText adds up to the plain answer, with usage": async () => {
    const plain = await generateText({ ...chat, prompt: "hello" });
    const result = streamText({ ...chat, prompt: "hello" });
    let text = "";
    for await (const part of result.textStream) text += part;
    assert.equal(text, plain.text);
    assert.equal((await result.usage).totalTokens, plain.usage.totalTokens);
  },

  "The messages of an answer are taken as history": async () => {
    const messages = [{ role: "system", content: "be brief" }, { role: "user", content: "hello" }];
    for (const text of ["more", "and more"]) {
      const { response } = await generateText({ ...chat, messages, allowSystemInMessages: true });
      messages.push(...response.messages, { role: "user", content: text });
    }
    assert.ok((await generateText({ ...chat, messages, allowSystemInMessages: true })).usage.totalTokens > 0);
  },

  "Completion models answer": async () => {
    const answer = await generateText({ ...completion, prompt: "import os" });
    assert.equal(typeof answer.text, "string");
  },

  "An overlong prompt is an APICallError with the gateway's message": async () => {
    await assert.rejects(generateText({ ...chat, prompt: OVERLONG }), (error) => {
      assert.ok(APICallError.isInstance(error));
      assert.equal(error.statusCode, 400);
      return error.message.includes("maximum context length");
    });
  },
};
