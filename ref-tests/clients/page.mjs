// The page at `/` in headless Chromium, by keyboard alone, against a running rsinfer server with the demo model.
// usage: node page.mjs http://HOST:PORT [CHROMIUM]
import assert from "node:assert/strict";
import { chromium } from "playwright-core";

const [base, executablePath = "chromium"] = process.argv.slice(2);
const browser = await chromium.launch({ executablePath, args: ["--no-sandbox"] });
const page = await browser.newPage();
const complaints = [];
page.on("console", (m) => m.type() === "error" && complaints.push(m.text()));
page.on("pageerror", (e) => complaints.push(String(e)));
page.on("request", (r) => r.url().startsWith(base) || r.url().startsWith("data:") || complaints.push(`asked ${r.url()}`));

const response = await page.goto(base);
const policy = response.headers()["content-security-policy"];
assert.ok(policy.startsWith("default-src 'none'") && !policy.includes("unsafe"), policy);
await page.waitForFunction(() => document.querySelectorAll("#model option").length > 0);
await page.selectOption("#model", { label: "demo:latest" });

// The text field has the focus: type, send with Enter, wait for the line of figures.
await page.focus("#text");
await page.keyboard.type("Tell me a story about a dog.");
await page.keyboard.press("Enter");
await page.waitForSelector("article.assistant .facts", { timeout: 60000 });
const answer = await page.textContent("article.assistant");
assert.ok(answer.length > 20, answer);
assert.equal(await page.evaluate(() => document.activeElement.id), "text");
const details = page.locator("article.assistant details");
if (await details.count()) {
  assert.equal(await details.first().getAttribute("open"), null, "thinking is folded");
  await page.focus("article.assistant summary");
  await page.keyboard.press("Enter");
  assert.notEqual(await details.first().getAttribute("open"), null, "a key unfolds it");
}

// The plan and the sequences of what is loaded.
await page.waitForSelector("#plan .slot", { timeout: 10000 });
const plan = await page.textContent("#plan");
assert.ok(plan.includes("demo:latest") && plan.includes("allocated") && plan.includes("cached"), plan);

// Markup in an answer or a question stays text.
await page.focus("#text");
await page.keyboard.type("<img src=x onerror=alert(1)>");
await page.keyboard.press("Enter");
await page.waitForFunction(() => document.querySelectorAll("article.user").length === 2);
assert.equal(await page.locator("article img").count(), 0);
await page.keyboard.press("Escape");
await page.waitForSelector("#stop", { state: "hidden", timeout: 60000 });

assert.deepEqual(complaints, []);
console.log("ok   page");
await browser.close();
