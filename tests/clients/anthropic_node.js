// Anthropic's client for JavaScript: node anthropic_node.js URL MODEL. The model says again what it was told.
import assert from "node:assert";
import Anthropic from "@anthropic-ai/sdk";

const [baseURL, model] = process.argv.slice(2);
const client = new Anthropic({ baseURL, apiKey: "none", maxRetries: 0 });
const hello = { model, max_tokens: 100, messages: [{ role: "user", content: "hello" }] };
const call = '<tool_call>\n{"name": "now", "arguments": {"at":"noon"}}\n</tool_call>';
const tools = [{ name: "now", input_schema: { type: "object", properties: { at: { type: "string" } } } }];

const answer = await client.messages.create(hello);
assert.equal(answer.content[0].text, "hello");
const stream = client.messages.stream(hello);
assert.equal(await stream.finalText(), "hello");
assert.deepEqual((await stream.finalMessage()).usage, answer.usage);
assert.equal((await client.messages.countTokens({ model, messages: hello.messages })).input_tokens, answer.usage.input_tokens);

const asked = { role: "user", content: call };
const first = await client.messages.stream({ ...hello, messages: [asked], tools }).finalMessage();
assert.equal(first.stop_reason, "tool_use");
assert.deepEqual(first.content[0].input, { at: "noon" });
const result = { type: "tool_result", tool_use_id: first.content[0].id, content: "It is noon." };
const turns = [asked, { role: "assistant", content: first.content }, { role: "user", content: [result] }];
const second = await client.messages.create({ ...hello, messages: turns, tools });
assert.match(second.content[0].text, /It is noon/);

await assert.rejects(client.messages.create({ ...hello, model: "other" }), Anthropic.NotFoundError);
