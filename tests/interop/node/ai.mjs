// The Vercel AI SDK (`ai` with `@ai-sdk/openai-compatible`), unmodified. Its stream parser refuses anything but a
// plain `data: [DONE]` (D5) and any chunk its schema does not know.

import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, streamText, tool } from "ai";
import { z } from "zod";

import { apiKey, baseURL, describe, run, thrown } from "./scenarios.mjs";

// the SDK's documented way to read fields that are not OpenAI's
const metadataExtractor = {
  extractMetadata: async ({ parsedBody }) => (parsedBody.x_br ? { x_br: parsedBody.x_br } : undefined),
  createStreamExtractor() {
    let seen;
    return {
      processChunk(chunk) {
        seen = chunk?.x_br ?? seen;
      },
      buildMetadata: () => (seen ? { x_br: seen } : undefined),
    };
  },
};

const provider = (key = apiKey) =>
  createOpenAICompatible({ name: "hotpath", baseURL, apiKey: key, includeUsage: true, metadataExtractor });
const fast = provider()("sim-fast");
const prompt = "whole [[sim chunks=8 seed=5]]";
const city = z.object({ city: z.string() });
const tools = {
  get_weather: tool({ description: "Calls get_weather.", inputSchema: city }),
  get_time: tool({ description: "Calls get_time.", inputSchema: city }),
};

await run({
  async generate() {
    const { text, finishReason, usage, response } = await generateText({ model: fast, prompt, maxRetries: 0 });
    return { text, finishReason, usage, headers: response.headers };
  },

  async stream() {
    const errors = [];
    const result = streamText({ model: fast, prompt, maxRetries: 0, onError: ({ error }) => errors.push(describe(error)) });
    let text = "";
    for await (const piece of result.textStream) text += piece;
    return {
      text,
      finishReason: await result.finishReason,
      usage: await result.usage,
      metadata: (await result.finalStep).providerMetadata,
      errors,
    };
  },

  async generate_tools() {
    const { toolCalls, finishReason } = await generateText({
      model: provider()("sim-tools"), prompt: "weather and time", tools, maxRetries: 0,
    });
    return { finishReason, calls: toolCalls.map(({ toolName, input, invalid }) => ({ toolName, input, invalid })) };
  },

  async stream_tools() {
    const errors = [];
    const result = streamText({
      model: provider()("sim-tools"), prompt: "weather and time", tools, maxRetries: 0,
      onError: ({ error }) => errors.push(describe(error)),
    });
    await result.consumeStream();
    const calls = await result.toolCalls;
    return {
      finishReason: await result.finishReason,
      calls: calls.map(({ toolName, input, invalid }) => ({ toolName, input, invalid })),
      errors,
    };
  },

  async abort() {
    const controller = new AbortController();
    let aborted = false;
    const result = streamText({
      model: fast, prompt: "abort [[sim chunks=400 pace=20]]", maxRetries: 0, abortSignal: controller.signal,
      onAbort: () => { aborted = true; },
      onError: () => {},
    });
    let pieces = 0;
    for await (const _ of result.textStream) {
      pieces += 1;
      if (pieces === 3) controller.abort();
    }
    return { pieces, aborted };
  },

  async wrong_key() {
    return thrown(() => generateText({ model: provider("wrong")("sim-fast"), prompt, maxRetries: 0 }));
  },

  async unknown_model() {
    return thrown(() => generateText({ model: provider()("no-such-model"), prompt, maxRetries: 0 }));
  },
});
