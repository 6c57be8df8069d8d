// The coding agent opencode reads a file by its tool: node opencode_agent.js URL MODEL. The model says what it was told.
import assert from "node:assert";
import { spawnSync } from "node:child_process";
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";

const [url, model] = process.argv.slice(2);
const folder = mkdtempSync(join(tmpdir(), "opencode-"));
const file = join(folder, "secret.txt");
const call = `<tool_call>\n{"name": "read", "arguments": {"filePath":${JSON.stringify(file)}}}\n</tool_call>`;
const provider = {
  npm: "@ai-sdk/openai-compatible",
  name: "brlite",
  options: { baseURL: `${url}/v1`, apiKey: "none" },
  models: { [model]: { name: model, tool_call: true, limit: { context: 60000, output: 2000 } } },
};
const config = {
  provider: { brlite: provider }, model: `brlite/${model}`, small_model: `brlite/${model}`,
  autoupdate: false, share: "disabled", enabled_providers: ["brlite"],
};
const env = {
  ...process.env, HOME: folder, PWD: folder, OPENCODE_CONFIG_CONTENT: JSON.stringify(config),
  OPENCODE_DISABLE_MODELS_FETCH: "1", OPENCODE_DISABLE_AUTOUPDATE: "1", OPENCODE_DISABLE_LSP_DOWNLOAD: "1",
  OPENCODE_DISABLE_DEFAULT_PLUGINS: "1",
};

try {
  writeFileSync(file, "the word is xyzzy\n");
  const program = join(dirname(fileURLToPath(import.meta.url)), "node_modules", ".bin", "opencode");
  const done = spawnSync(program, ["run", "--format", "json"], { cwd: folder, env, input: call, encoding: "utf8", timeout: 120000 });
  assert.equal(done.status, 0, done.stdout + done.stderr);
  const events = done.stdout.trim().split("\n").map((line) => JSON.parse(line));
  const used = events.filter(({ type }) => type === "tool_use").map(({ part }) => part);
  assert.equal(used[0]?.tool, "read", done.stdout + done.stderr);
  assert.equal(used[0].state.status, "completed", done.stdout);
  assert.match(used[0].state.output, /xyzzy/);
  assert.ok(events.some(({ type }) => type === "text"), done.stdout);
} finally {
  rmSync(folder, { recursive: true, force: true });
}
