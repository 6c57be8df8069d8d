// LangChain for JavaScript: node langchain_js.js URL MODEL. The model says again what it was told.
import assert from "node:assert";
import { HumanMessage, ToolMessage } from "@langchain/core/messages";
import { tool } from "@langchain/core/tools";
import { ChatOpenAI, OpenAIEmbeddings } from "@langchain/openai";
import { z } from "zod";

const [url, model] = process.argv.slice(2);
const access = { model, apiKey: "none", maxRetries: 0, configuration: { baseURL: `${url}/v1` } };
const call = '<tool_call>\n{"name": "now", "arguments": {"at":"noon"}}\n</tool_call>';
const now = tool(({ at }) => `It is ${at}.`, { name: "now", description: "The time.", schema: z.object({ at: z.string() }) });
const Weather = z.object({ city: z.string(), days: z.number().int() });

for (const useResponsesApi of [false, true]) {
  const chat = new ChatOpenAI({ ...access, useResponsesApi });

  const answer = await chat.invoke("hello");
  assert.equal(answer.text, "hello");
  let streamed;
  for await (const chunk of await chat.stream("hello")) streamed = streamed ? streamed.concat(chunk) : chunk;
  assert.equal(streamed.text, "hello");
  assert.equal(streamed.usage_metadata.total_tokens, answer.usage_metadata.total_tokens);

  const asked = new HumanMessage(call);
  const first = await chat.bindTools([now]).invoke([asked]);
  assert.deepEqual(first.tool_calls.map(({ name, args }) => ({ name, args })), [{ name: "now", args: { at: "noon" } }]);
  const result = new ToolMessage({ content: await now.invoke(first.tool_calls[0].args), tool_call_id: first.tool_calls[0].id });
  assert.match((await chat.bindTools([now]).invoke([asked, first, result])).text, /It is noon/);

  const structured = chat.withStructuredOutput(Weather, { name: "weather", method: "jsonSchema" });
  assert.deepEqual(await structured.invoke('{"city":"Paris","days":2}'), { city: "Paris", days: 2 });

  await assert.rejects(new ChatOpenAI({ ...access, model: "other", useResponsesApi }).invoke("hello"), { status: 404 });
}

const embeddings = new OpenAIEmbeddings(access);
const [one, two] = await embeddings.embedDocuments(["one", "two"]);
assert.equal(one.length, two.length);
assert.deepEqual(await embeddings.embedQuery("one"), one);
