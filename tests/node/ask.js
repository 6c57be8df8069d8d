// Asks a server with OpenAI's own client and prints what came, as JSON: node ask.js URL KEY MODEL
// With a fourth argument it asks for one stream of so many tokens instead, and says "begun" when that has.
import OpenAI from "openai";

const [url, apiKey, model, numTokens] = process.argv.slice(2);
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey, maxRetries: 0, timeout: 30_000 });
const chat = { model, messages: [{ role: "user", content: "Hi" }], temperature: 0, max_tokens: 12 };
const completion = { model, prompt: "Hi", temperature: 0, max_tokens: 12 };

async function text(stream) {
  let said = "";
  for await (const event of stream) {
    const choice = event.choices[0];
    said += choice.text ?? choice.delta.content ?? "";
  }
  return said;
}

async function longStream() {
  const stream = await client.completions.create({
    ...completion, max_tokens: Number(numTokens), ignore_eos: true, stream: true,
  });
  let numEvents = 0;
  for await (const _ of stream) {
    if (numEvents++ === 0) console.log("begun");
  }
  return numEvents;
}

const questions = numTokens ? { longStream } : {
  chat: async () => (await client.chat.completions.create(chat)).choices[0].message.content,
  chatStream: async () => text(await client.chat.completions.create({ ...chat, stream: true })),
  completion: async () => (await client.completions.create(completion)).choices[0].text,
  completionStream: async () => text(await client.completions.create({ ...completion, stream: true })),
  models: async () => (await client.models.list()).data.map((model) => model.id),
  unknownModel: () => client.completions.create({ ...completion, model: "unheard-of" }),
  badField: () => client.completions.create({ ...completion, top_p: 2 }),
  wrongKey: () => client.withOptions({ apiKey: "wrong" }).completions.create(completion),
};

const answers = {};
for (const [name, ask] of Object.entries(questions)) {
  try {
    answers[name] = await ask();
  } catch (error) {
    const { status, code, param, message } = error;
    answers[name] = { error: error.constructor.name, status, code, param, message };
  }
}
console.log(JSON.stringify(answers));
