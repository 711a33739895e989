// The page at `/` in headless Chromium, by keyboard, against servers with the demo model that this script starts and stops.
// usage: node page.mjs RSINFER [CHROMIUM [FOLDER FOR SCREENSHOTS]]
import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { createInterface } from "node:readline";
import { chromium } from "playwright-core";

const [binary, executablePath = "chromium", shots] = process.argv.slice(2);
const store = mkdtempSync(`${tmpdir()}/rsinfer-page-`);
const started = [];

async function serve(at = "127.0.0.1:0", ...more) {
  const env = { ...process.env, RSINFER_MODELS: store, OLLAMA_MODELS: `${store}/none` };
  const child = spawn(binary, ["serve", "--host", at, "--parallel", "2", "-c", "512", ...more], { env, stdio: ["ignore", "ignore", "pipe"] });
  started.push(child);
  const base = await new Promise((found, failed) => {
    createInterface(child.stderr).on("line", (l) => l.includes("serves on ") && found(l.split("serves on ")[1].trim()));
    child.on("exit", () => failed(new Error("the server did not start")));
  });
  const stop = () => new Promise((gone) => { child.on("exit", gone); child.kill("SIGKILL"); });
  return { base, stop };
}

const wait = { timeout: 60_000 };
const shot = (page, name) => shots && page.screenshot({ path: `${shots}/${name}.png` });
const fits = async (page) => assert.ok(await page.evaluate(() => document.documentElement.scrollWidth <= innerWidth), "wider than the window");
const facts = (page, n) => page.locator(".said.assistant .facts").nth(n - 1).waitFor(wait);
async function say(page, text) {
  await page.fill("#prompt", text);
  await page.focus("#prompt");
  await page.keyboard.press("Enter");
}
const ready = (page) => page.waitForFunction(() => document.querySelector("#model").value.startsWith("demo"), null, wait);

// Asks, unfolds the thinking, reads the plan; then a text longer than the context, of which something must go.
async function conversation(page, base) {
  const response = await page.goto(base);
  const policy = response.headers()["content-security-policy"];
  assert.ok(policy.startsWith("default-src 'none'") && !policy.includes("unsafe"), policy);
  await ready(page);
  await page.getByText("No model is loaded").waitFor(wait);
  await shot(page, "empty");
  // The field has the focus from the beginning.
  await page.keyboard.type("Tell me a story about a king.");
  await page.keyboard.press("Enter");
  await facts(page, 1);
  assert.equal(await page.evaluate(() => document.activeElement.id), "prompt");
  const thinking = page.locator(".said.assistant details");
  assert.equal(await thinking.getAttribute("open"), null, "thinking is folded");
  await thinking.locator("summary").focus();
  await page.keyboard.press("Space");
  await thinking.locator(".thought").waitFor(wait);
  assert.ok((await page.locator(".said.assistant > div").last().innerText()).trim(), "there is no answer");
  const side = page.locator("#side");
  await side.getByText("KV cache, all sequences").waitFor(wait);
  await side.getByText("none evicted").first().waitFor(wait);
  await shot(page, "answered");
  await say(page, "Once there was a fox who lived in a wood and was fond of apples. ".repeat(60));
  await facts(page, 2);
  assert.match(await page.locator(".facts").last().innerText(), /\d tokens evicted/);
  await side.locator(".held p", { hasText: /\d evicted/ }).first().waitFor(wait);
  const strengths = await side.locator(".held rect").evaluateAll((all) => all.map((r) => Number(r.getAttribute("fill-opacity"))));
  assert.ok(Math.min(...strengths) < 0.5 && Math.max(...strengths) > 0.5, `${strengths}`);
  await shot(page, "evicted");
  await fits(page);
}

// Escape ends an answer, and the sequence is free again.
async function stopped(page) {
  await page.getByRole("button", { name: "New chat" }).click();
  // Nothing that the model says may end the answer before the key does.
  await page.route("**/api/chat", (r) => r.continue({ postData: JSON.stringify({ ...r.request().postDataJSON(), options: { ignore_eos: true } }) }));
  await say(page, "Tell me a story.");
  await page.waitForFunction(() => document.querySelector(".said.assistant")?.textContent.length > 40, null, wait);
  await page.locator(".held.busy").waitFor(wait);
  await shot(page, "streaming");
  await page.keyboard.press("Escape");
  await page.locator(".facts", { hasText: "stopped" }).waitFor(wait);
  await page.locator(".held.busy").waitFor({ state: "detached", ...wait });
  await page.unroute("**/api/chat");
}

// What a model or a user says is text: markup stays as it is, code is set apart, a long word does not widen the page.
async function markup(page) {
  const said = "<b onclick=x>bold</b>\n```html\n<script>alert(1)</script>\n```\nand `code` " + "w".repeat(400);
  const lines = [{ message: { content: said }, done: false }, { message: {}, done: true, eval_count: 2, eval_duration: 5, prompt_eval_count: 1, total_duration: 9 }];
  await page.route("**/api/chat", (r) => r.fulfill({ contentType: "application/x-ndjson", body: lines.map((l) => JSON.stringify(l) + "\n").join("") }));
  await page.getByRole("button", { name: "New chat" }).click();
  await say(page, "<img src=x onerror=alert(1)>");
  await facts(page, 1);
  assert.equal(await page.locator(".said pre code").innerText(), "<script>alert(1)</script>");
  assert.equal(await page.locator(".said.user .text").innerText(), "<img src=x onerror=alert(1)>");
  assert.equal(await page.locator(".said b, .said img, .said script").count(), 0);
  await fits(page);
  await shot(page, "markup");
  // A stream that ends early is no answer.
  await page.unroute("**/api/chat");
  await page.route("**/api/chat", (r) => r.fulfill({ contentType: "application/x-ndjson", body: JSON.stringify(lines[0]) + "\n" }));
  await say(page, "Again");
  await page.getByRole("alert").getByText("broke off").waitFor(wait);
  await page.unroute("**/api/chat");
}

async function phone(browser, base) {
  const context = await browser.newContext({ viewport: { width: 390, height: 844 }, colorScheme: "dark", hasTouch: true, isMobile: true });
  const page = await context.newPage();
  await page.goto(base);
  await ready(page);
  assert.equal(await page.locator("#side").isVisible(), false);
  await say(page, "Tell me a story about a dog.");
  await facts(page, 1);
  await shot(page, "phone");
  await page.getByRole("button", { name: "Memory" }).tap();
  await page.getByText("KV cache, all sequences").waitFor(wait);
  await shot(page, "phone-memory");
  await fits(page);
  for (const e of await page.locator("button:visible, header select").all()) assert.ok((await e.boundingBox()).height >= 40, "too small for a finger");
  await context.close();
}

// A server that is gone is said in words, and the question can be asked again when it is back.
async function gone(page, server) {
  await page.getByRole("button", { name: "New chat" }).click();
  await server.stop();
  await say(page, "Are you there?");
  await page.getByRole("alert").getByText("does not answer").waitFor(wait);
  await shot(page, "gone");
  const back = await serve(server.base.replace("http://", ""));
  await page.getByRole("button", { name: "Try again" }).press("Enter");
  await facts(page, 1);
  assert.equal(await page.getByRole("alert").count(), 0);
  await back.stop();
}

async function key(browser) {
  const server = await serve("127.0.0.1:0", "--api-key", "secret");
  const page = await browser.newPage();
  await page.goto(server.base);
  await page.waitForFunction(() => document.activeElement.id === "key", null, wait);
  await page.keyboard.type("secret");
  await page.keyboard.press("Tab");
  await ready(page);
  await page.close();
  await server.stop();
}

const browser = await chromium.launch({ executablePath, args: ["--no-sandbox"] });
try {
  const server = await serve();
  const page = await browser.newPage({ viewport: { width: 1280, height: 800 } });
  const complaints = [];
  page.on("console", (m) => m.type() === "error" && complaints.push(m.text()));
  page.on("pageerror", (e) => complaints.push(String(e)));
  page.on("request", (r) => r.url().startsWith(server.base) || r.url().startsWith("data:") || complaints.push(`asked ${r.url()}`));
  await conversation(page, server.base);
  await stopped(page);
  await markup(page);
  assert.deepEqual(complaints, []);
  await phone(browser, server.base);
  await gone(page, server);
  await key(browser);
  console.log("ok   page");
} finally {
  await browser.close();
  for (const child of started) child.kill("SIGKILL");
  rmSync(store, { recursive: true, force: true });
}
