// A test suite in JavaScript that uses all of -http: node .ci/http.mjs [COMMAND [ARGUMENT...]]
//
// It needs nothing but Node 18 and the command, which is "python3 -m smtpmock" by default. The exit status is 1 if
// a test fails.
import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { once } from "node:events";
import http from "node:http";
import net from "node:net";
import { createInterface } from "node:readline";
import { after, before, beforeEach, test } from "node:test";

const [program, ...first] = process.argv.length > 2 ? process.argv.slice(2) : ["python3", "-m", "smtpmock"];
const server = spawn(program, [...first, "-http=0", "-control"], { stdio: ["pipe", "pipe", "inherit"] });
const exit = once(server, "exit");
let address;

const get = (path, options) => fetch(address.http + path, { signal: AbortSignal.timeout(20_000), ...options });
const read = async (path) => (await get(path)).json();
const post = (path, body = "") => get(path, { method: "POST", body });

/** Sends a mail; resolves to the last reply. */
async function send({ from = "shop@example.com", to = ["bob@example.com"], lines = ["Subject: Hi", "", "Hello"] } = {}) {
  const socket = net.connect(address.port, address.host).setEncoding("utf8");
  const replies = createInterface({ input: socket })[Symbol.asyncIterator]();
  let reply = (await replies.next()).value;
  const recipients = to.map((name) => `RCPT TO:<${name}>`);
  for (const line of ["HELO a.example", `MAIL FROM:<${from}>`, ...recipients, "DATA", [...lines, "."].join("\r\n")]) {
    if (/^[45]/.test(reply)) break;
    socket.write(`${line}\r\n`);
    reply = (await replies.next()).value;
  }
  socket.end("QUIT\r\n");
  await once(socket, "close");
  return reply;
}

before(async () => {
  const lines = createInterface({ input: server.stdout });
  address = JSON.parse((await once(lines, "line"))[0]);
  lines.on("line", () => {});
});
beforeEach(async () => assert.equal((await post("/reset")).status, 200));
after(async () => {
  server.stdin.end("stop\n");
  assert.deepEqual(await exit, [0, null]);
});

test("mails as JSON, with filters", async () => {
  await send({ to: ["bob@example.com", "eve+x@example.com"], lines: ["Subject: =?utf-8?q?Gr=C3=BC=C3=9Fe?=", "", "Hello"] });
  await send({ from: "", lines: ["Subject: Two", "", "Hello"] });
  const { messages } = await read("/messages");
  assert.deepEqual(messages.map(({ subject }) => subject), ["Grüße", "Two"]);
  assert.deepEqual(messages[0].rcpt_tos, ["bob@example.com", "eve+x@example.com"]);
  assert.deepEqual(await read(`/messages/${messages[0].id}`), messages[0]);
  for (const [query, subjects] of [
    ["to=EVE%2Bx@example.com", ["Grüße"]],
    ["from=", ["Two"]],
    [new URLSearchParams({ subject: "rüß", accepted: true }), ["Grüße"]],
    ["accepted=false", []],
  ]) {
    assert.deepEqual((await read(`/messages?${query}`)).messages.map(({ subject }) => subject), subjects, query);
  }
  const mail = await get(`/messages/${messages[0].id}/eml`);
  assert.equal(mail.headers.get("content-type"), "message/rfc822");
  assert.match(await mail.text(), /^Return-Path: <shop@example.com>\r\n/);
});

test("the next mail is a loop of one request", async () => {
  let { next } = await read("/messages");
  for (const subject of ["a", "b", "c"]) {
    const waiting = read(`/messages?after=${next}&timeout=20`);
    await send({ lines: [`Subject: ${subject}`, "", ""] });
    const answer = await waiting;
    assert.deepEqual(answer.messages.map((mail) => mail.subject), [subject]);
    next = answer.next;
    await post("/purge");
  }
  const late = await get(`/messages?after=${next}&timeout=0.05`);
  assert.equal(late.status, 404);
  assert.match((await late.json()).error, /^0 of 1 matching messages came in 0.05 seconds/);
});

test("attachments", async () => {
  const head = ["MIME-Version: 1.0", "Content-Type: multipart/mixed; boundary=x", "", "--x", "", "Hello", "--x"];
  const part = ["Content-Disposition: attachment; filename=\"a.bin\"", "Content-Transfer-Encoding: base64", "", "AP8=", "--x--"];
  await send({ lines: [...head, ...part] });
  const { messages: [{ id, attachments }] } = await read("/messages");
  assert.equal(attachments[0].name, "a.bin");
  const file = await get(`/messages/${id}/attachments/0`);
  assert.deepEqual([...new Uint8Array(await file.arrayBuffer())], [0, 255]);
  assert.match(file.headers.get("content-disposition"), /^attachment; .*a\.bin/);
});

test("failures, options, and what is wrong with a command", async () => {
  assert.deepEqual(await (await post("/rule", "RCPT: reply 450-Wait\n450 Later; times=1")).json(), {
    event: "done", command: "rule RCPT: reply 450-Wait\n450 Later; times=1", messages: 0,
  });
  assert.equal((await post("/check")).status, 409);
  assert.equal(await send(), "450-Wait");
  assert.equal(await send(), "250 Received");
  assert.equal((await post("/check")).status, 200);
  await post("/configure", "-msgMsgReceived='250 Mine'");
  assert.equal(await send(), "250 Mine");
  const bad = await post("/rule", "RCTP: close");
  assert.equal(bad.status, 400);
  assert.match((await bad.json()).error, /did you mean RCPT/);
  assert.equal((await post("/clear")).status, 200);
  const socket = net.connect(address.port, address.host);
  await once(socket, "data");
  const error = new Promise((resolve) => socket.on("error", resolve));
  assert.equal((await post("/disconnect", "reset")).status, 200);
  assert.equal((await error).code, "ECONNRESET");
});

test("violations, and the certificate", async () => {
  await send({ lines: ["Subject: no date", "", ""] });
  assert.ok((await read("/violations")).violations.some(({ code }) => code === "header-missing"));
  assert.equal((await get("/ca.pem")).status, 200);
});

test("pages", async () => {
  await send({ lines: ["Subject: <b>", "Content-Type: text/html", "", "<p>Hello"] });
  const list = await (await get("/")).text();
  const [path] = list.match(/\/view\/\d+/);
  assert.match(list, /&lt;b&gt;/);
  assert.match(await (await get(path)).text(), /<iframe sandbox/);
  const html = await get(`${path}/html`);
  assert.match(html.headers.get("content-security-policy"), /^default-src 'none'.*sandbox/);
  assert.match(await html.text(), /<p>Hello/);
});

test("errors", async () => {
  const status = async (path, options) => (await get(path, options)).status;
  assert.equal(await status("/nothing"), 404);
  assert.equal(await status("/messages", { method: "DELETE" }), 405);
  assert.equal(await status("/messages?tmeout=1"), 400);
  assert.equal(await status("/rule", { method: "POST", body: "x".repeat(2 ** 21) }), 413);
  assert.equal(await status("/messages", { headers: { "Sec-Fetch-Site": "cross-site" } }), 403);
  const stream = new Blob(["RCPT: close"]).stream();
  assert.equal(await status("/rule", { method: "POST", body: stream, duplex: "half" }), 411);
  const request = http.get(`${address.http}/messages`, { headers: { Host: "evil.example" } });
  const [answer] = await once(request, "response");
  assert.equal(answer.statusCode, 421);
  answer.resume();
});
