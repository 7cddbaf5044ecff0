// The `openai` npm client, unmodified.

import OpenAI from "openai";

import { apiKey, baseURL, run, thrown, tools } from "./scenarios.mjs";

const client = new OpenAI({ baseURL, apiKey, maxRetries: 0 });
const ask = (content, extra = {}) => ({
  model: "sim-fast",
  messages: [{ role: "user", content }],
  ...extra,
});

async function collect(stream) {
  const seen = { text: "", chunks: 0, usage: null, xbr: null, finish: null, calls: {} };
  for await (const chunk of stream) {
    seen.chunks += 1;
    if (chunk.usage) seen.usage = chunk.usage;
    if (chunk.x_br) seen.xbr = chunk.x_br;
    for (const choice of chunk.choices) {
      seen.text += choice.delta.content ?? "";
      seen.finish = choice.finish_reason ?? seen.finish;
      for (const part of choice.delta.tool_calls ?? []) {
        const call = (seen.calls[part.index] ??= { id: "", name: "", arguments: "" });
        call.id += part.id ?? "";
        call.name += part.function?.name ?? "";
        call.arguments += part.function?.arguments ?? "";
      }
    }
  }
  return seen;
}

await run({
  async whole() {
    const { data, response } = await client.chat.completions
      .create(ask("whole [[sim chunks=8 seed=5]]"), { headers: { "X-Request-ID": "node.whole-1" } })
      .withResponse();
    const choice = data.choices[0];
    return {
      text: choice.message.content,
      finish: choice.finish_reason,
      usage: data.usage,
      headers: Object.fromEntries(response.headers),
    };
  },

  async streamed() {
    return collect(await client.chat.completions.create(ask("whole [[sim chunks=8 seed=5]]", { stream: true })));
  },

  async streamed_with_usage() {
    const request = ask("whole [[sim chunks=8 seed=5]]", { stream: true, stream_options: { include_usage: true } });
    return collect(await client.chat.completions.create(request));
  },

  async tools_whole() {
    const answer = await client.chat.completions.create(ask("weather and time", { model: "sim-tools", tools }));
    return { finish: answer.choices[0].finish_reason, calls: answer.choices[0].message.tool_calls };
  },

  async tools_streamed() {
    const request = ask("weather and time", { model: "sim-tools", tools, stream: true });
    return collect(await client.chat.completions.create(request));
  },

  async helper_stream() {
    // the SDK's own accumulator, which throws on a chunk it cannot merge
    const runner = client.chat.completions.stream(ask("whole [[sim chunks=8 seed=5]]"));
    const answer = await runner.finalChatCompletion();
    return { text: answer.choices[0].message.content, finish: answer.choices[0].finish_reason };
  },

  async abort() {
    const controller = new AbortController();
    const request = ask("abort [[sim chunks=400 pace=20]]", { stream: true });
    const stream = await client.chat.completions.create(request, { signal: controller.signal });
    let chunks = 0;
    for await (const chunk of stream) {
      chunks += chunk.choices.length;
      if (chunks === 3) controller.abort();
    }
    return { chunks, aborted: controller.signal.aborted };
  },

  async timeout() {
    return thrown(() =>
      client.chat.completions.create(ask("late [[sim chunks=400 pace=20]]"), { timeout: 300 }),
    );
  },

  async wrong_key() {
    return thrown(() => new OpenAI({ baseURL, apiKey: "wrong", maxRetries: 0 }).chat.completions.create(ask("x")));
  },

  async unknown_model() {
    return thrown(() => client.chat.completions.create(ask("x", { model: "no-such-model" })));
  },

  async bad_request() {
    return thrown(() => client.chat.completions.create(ask("x", { max_tokens: -1 })));
  },

  async models() {
    const names = [];
    for await (const model of client.models.list()) names.push(model.id);
    return names;
  },
});
