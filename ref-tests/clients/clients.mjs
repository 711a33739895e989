// The npm libraries that users have (openai, ollama) against a running rsinfer server.
// usage: node clients.mjs http://HOST:PORT
import assert from "node:assert/strict";
import OpenAI from "openai";
import { Ollama } from "ollama";

const base = process.argv[2];
const model = "demo";
const messages = [{ role: "user", content: "Tell me a story about a dog." }];
const schema = {
  type: "object",
  properties: { age: { enum: [3, 7] } },
  required: ["age"],
  additionalProperties: false,
};
const openai = new OpenAI({ baseURL: `${base}/v1`, apiKey: "unused", maxRetries: 0 });
const ollama = new Ollama({ host: base });

const checks = {
  async openaiChat() {
    const whole = await openai.chat.completions.create({ model, messages, max_tokens: 30, seed: 1 });
    let text = "";
    const stream = await openai.chat.completions.create({ model, messages, max_tokens: 30, seed: 1, stream: true });
    for await (const chunk of stream) text += chunk.choices[0]?.delta?.content ?? "";
    assert.equal(text, whole.choices[0].message.content ?? "");
  },
  async openaiSchemaAndEmbeddings() {
    const response_format = { type: "json_schema", json_schema: { name: "x", schema } };
    const got = await openai.chat.completions.create({ model, messages, response_format });
    assert.ok([3, 7].includes(JSON.parse(got.choices[0].message.content).age));
    const vectors = await openai.embeddings.create({ model, input: ["one", "two"] });
    assert.equal(vectors.data.length, 2);
  },
  async openaiErrors() {
    await assert.rejects(openai.chat.completions.create({ model: "nosuch", messages }), { status: 404 });
  },
  async ollamaChat() {
    const options = { num_predict: 30, seed: 1 };
    const whole = await ollama.chat({ model, messages, options });
    let text = "";
    for await (const part of await ollama.chat({ model, messages, options, stream: true })) text += part.message.content;
    assert.equal(text, whole.message.content);
    const held = await ollama.chat({ model, messages, format: schema });
    assert.ok([3, 7].includes(JSON.parse(held.message.content).age));
  },
  async ollamaModels() {
    await ollama.generate({ model, prompt: "Hi", keep_alive: "30m", options: { num_predict: 1 } });
    assert.ok((await ollama.ps()).models.length >= 1);
    assert.equal((await ollama.embed({ model, input: ["one", "two"] })).embeddings.length, 2);
    assert.ok((await ollama.list()).models.some((m) => m.name.startsWith("demo")));
  },
};

let failed = 0;
for (const [name, check] of Object.entries(checks)) {
  try {
    await check();
    console.log("ok  ", name);
  } catch (e) {
    failed += 1;
    console.log("FAIL", name, String(e).slice(0, 500));
  }
}
process.exit(failed ? 1 : 0);
