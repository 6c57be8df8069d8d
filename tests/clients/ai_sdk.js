// Vercel's AI SDK with its provider for compatible servers: node ai_sdk.js URL MODEL. The model says again what it was told.
import assert from "node:assert";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { embedMany, generateText, Output, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";

const [url, name] = process.argv.slice(2);
const provider = createOpenAICompatible({ name: "brlite", baseURL: `${url}/v1`, apiKey: "none", includeUsage: true, supportsStructuredOutputs: true });
const model = provider(name);
const call = '<tool_call>\n{"name": "now", "arguments": {"at":"noon"}}\n</tool_call>';
const tools = { now: tool({ description: "The time.", inputSchema: z.object({ at: z.string() }), execute: async ({ at }) => `It is ${at}.` }) };
const common = { model, maxRetries: 0 };

const answer = await generateText({ ...common, prompt: "hello" });
assert.equal(answer.text, "hello");
assert.equal(answer.finishReason, "stop");
const stream = streamText({ ...common, prompt: "hello" });
let streamed = "";
for await (const part of stream.textStream) streamed += part;
assert.equal(streamed, "hello");
assert.equal((await stream.usage).totalTokens, answer.usage.totalTokens);

const agent = await generateText({ ...common, prompt: call, tools, stopWhen: stepCountIs(2) });
assert.equal(agent.steps.length, 2);
assert.equal(agent.steps[0].finishReason, "tool-calls");
assert.match(agent.text, /It is noon/);
const streamedAgent = streamText({ ...common, prompt: call, tools, stopWhen: stepCountIs(2) });
assert.match(await streamedAgent.text, /It is noon/);
const forced = await generateText({ ...common, prompt: call, tools, toolChoice: "required" });
assert.equal(forced.toolCalls[0].toolName, "now");

const output = Output.object({ schema: z.object({ city: z.string(), days: z.number().int() }) });
const structured = await generateText({ ...common, prompt: '{"city":"Paris","days":2}', output });
assert.deepEqual(structured.output, { city: "Paris", days: 2 });
assert.deepEqual(structured.warnings ?? [], []);

const { embeddings } = await embedMany({ model: provider.embeddingModel(name), values: ["one", "two"] });
assert.equal(embeddings.length, 2);
assert.equal(embeddings[0].length, embeddings[1].length);

await assert.rejects(generateText({ model: provider("other"), prompt: "hello", maxRetries: 0 }), { statusCode: 404 });
