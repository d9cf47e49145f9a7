// A test suite in JavaScript that controls smtpmock: node .ci/control.mjs [COMMAND [ARGUMENT...]]
//
// It needs nothing but Node 18 and the command, which is "python3 -m smtpmock" by default. The exit status is 1 if
// a test fails.
import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { once } from "node:events";
import net from "node:net";
import { createInterface } from "node:readline";
import { after, before, beforeEach, test } from "node:test";

const PATIENCE = 20_000;
const [program, ...first] = process.argv.length > 2 ? process.argv.slice(2) : ["python3", "-m", "smtpmock"];

/** A server in a process of its own. It ends with this one, because its stdin does. */
class Server {
  #answers = [];
  #messages = [];
  #waiting = [];

  async start(...flags) {
    this.process = spawn(program, [...first, "-control", ...flags], { stdio: ["pipe", "pipe", "inherit"] });
    this.exit = once(this.process, "exit");
    createInterface({ input: this.process.stdout }).on("line", (line) => this.#take(JSON.parse(line)));
    this.address = await this.#next(this.#answers);
    assert.equal(this.address.event, "listening", this.address.error);
    return this;
  }

  #take(event) {
    (event.event === "message" ? this.#messages : this.#answers).push(event);
    this.#waiting.splice(0).forEach((wake) => wake());
  }

  async #next(events) {
    const end = Date.now() + PATIENCE;
    while (!events.length) {
      assert.ok(Date.now() < end && this.process.exitCode === null, "no event came in time");
      await new Promise((wake) => {
        this.#waiting.push(wake);
        setTimeout(wake, 100);
      });
    }
    return events.shift();
  }

  /** Resolves to the answer to a command, which is in force then; rejects with what is wrong with it. */
  async ask(command) {
    this.process.stdin.write(`${command}\n`);
    const answer = await this.#next(this.#answers);
    assert.equal(answer.command, command);
    if (answer.event === "error") throw new Error(answer.error);
    return answer;
  }

  /** Resolves to the next message. */
  message() {
    return this.#next(this.#messages);
  }
}

/** A client of its own, so that the suite needs no package. */
class Client {
  async connect({ host, port }) {
    this.socket = net.connect(port, host).setEncoding("utf8");
    this.lines = createInterface({ input: this.socket })[Symbol.asyncIterator]();
    this.closed = new Promise((resolve) => {
      this.socket.on("error", (error) => resolve(error.code)).on("close", () => resolve("closed"));
    });
    this.greeting = await this.reply();
    return this;
  }

  async reply() {
    const lines = [];
    for (;;) {
      const { value, done } = await this.lines.next();
      if (done) return [...lines, "<closed>"].join("\n");
      lines.push(value);
      if (value[3] !== "-") return lines.join("\n");
    }
  }

  async say(...commands) {
    let last;
    for (const command of commands) {
      this.socket.write(`${command}\r\n`);
      last = await this.reply();
    }
    return last;
  }

  send(...lines) {
    const envelope = ["EHLO test.example.com", "MAIL FROM:<a@example.com>", "RCPT TO:<b@example.com>", "DATA"];
    return this.say(...envelope, [...lines, "."].join("\r\n"));
  }
}

const server = new Server();
const connect = () => new Client().connect(server.address);

before(() => server.start("-multipleRcptto"));
beforeEach(() => server.ask("reset"));
after(async () => {
  assert.equal((await server.ask("stop")).messages, 0); // the last reset has removed them
  assert.deepEqual(await server.exit, [0, null]);
});

test("a mail is recorded before it is accepted", async () => {
  const client = await connect();
  assert.equal(await client.send("Subject: =?utf-8?q?Gr=C3=BC=C3=9Fe?=", "", "Hello"), "250 Received");
  const mail = await server.message();
  assert.deepEqual([mail.mail_from, mail.rcpt_tos, mail.subject], ["a@example.com", ["b@example.com"], "Grüße"]);
  assert.equal(mail.text.trim(), "Hello");
  assert.equal(await client.say("QUIT"), "221 Closing connection");
});

test("a client is told to come back twice", async () => {
  await server.ask("rule RCPT b@example.com: reply 450 4.2.0 Greylisted; times=2");
  const client = await connect();
  await client.say("EHLO test.example.com", "MAIL FROM:<a@example.com>");
  const replies = [];
  for (let attempt = 0; attempt < 3; attempt++) replies.push(await client.say("RCPT TO:<b@example.com>"));
  assert.deepEqual(replies, ["450 4.2.0 Greylisted", "450 4.2.0 Greylisted", "250 Received"]);
  await server.ask("check");
  client.socket.destroy();
  assert.deepEqual((await server.message()).refusals.length, 2);
});

test("a rule that is never hit is reported", async () => {
  await server.ask("rule VRFY: close");
  await assert.rejects(server.ask("check"), /never hit/);
  await server.ask("clear");
  await server.ask("check");
});

test("options change while it runs, and reset undoes that", async () => {
  await server.ask('configure -failFast -msgGreeting="220-Hi\\n220 there" -extensions=SIZE');
  const client = await connect();
  assert.equal(client.greeting, "220-Hi\n220 there");
  assert.match(await client.say("EHLO test.example.com"), /SIZE/);
  assert.match(await client.say("FOO"), /^502/);
  assert.equal(await client.reply(), "<closed>");
  await server.message();
  await server.ask("reset");
  assert.equal((await connect()).greeting, "220 Welcome");
});

test("connections end with a FIN or an RST", async () => {
  for (const [command, result] of [["disconnect", "closed"], ["disconnect reset", "ECONNRESET"]]) {
    const client = await connect();
    await client.say("EHLO test.example.com");
    await server.ask(command);
    assert.equal(await client.closed, result);
    assert.match((await server.message()).transcript, /EHLO test/);
  }
});

test("a bad command says what is wrong, and changes nothing", async () => {
  await assert.rejects(server.ask("rule RCTP: reply 450 later"), /did you mean RCPT/);
  await assert.rejects(server.ask("configure -failFast -prot=1"), /did you mean -port/);
  await assert.rejects(server.ask("remove everything"), /must be rule RULE/);
  const client = await connect();
  assert.match(await client.say("FOO"), /^502/);
  assert.equal(await client.send("Hi"), "250 Received");
  assert.equal((await server.message()).is_consistent, true);
  assert.equal((await server.ask("purge")).messages, 0);
});

test("a bad flag is an error event, and exit status 2", async () => {
  const bad = spawn(program, [...first, "-control", "-port=x"], { stdio: ["pipe", "pipe", "ignore"] });
  const exit = once(bad, "exit");
  let said = "";
  for await (const text of bad.stdout.setEncoding("utf8")) said += text;
  const { event, error } = JSON.parse(said);
  assert.equal(event, "error");
  assert.match(error, /^-port='x': must be an integer/);
  assert.deepEqual(await exit, [2, null]);
});

test("the end of its stdin stops it", async () => {
  const other = await new Server().start();
  other.process.stdin.end();
  assert.deepEqual(await other.exit, [0, null]);
});
