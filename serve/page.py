"""The page at ``/``: ask for text or audio, watch tokens come, and see the running batch fill.

One file without anything from elsewhere; a policy in its head allows this script, this style, and requests to the server that
it came from. Whatever the server says becomes text of an element, never markup. A key is kept in its field alone: not in
storage, nor in the address. ``/#demo`` starts four answers by itself, for a screen on a wall and for tests.

It asks ``/v1/engine`` twice a second while it can be seen, and ``/v1/completions``. It knows no engine.
"""

from base64 import b64encode
from functools import cache
from hashlib import sha256

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #ffffff; --panel: #f4f6f8; --rule: #d9dfe4; --edge: #87939e; --soft: #56616b; --ink: #1a2025; --link: #1f6f8b;
  --on-link: #ffffff; --fail: #b3261e; --pass: #1b7a4b;
  --m0: #1f6f8b; --m1: #b06a14; --m2: #7a5aa6; --m3: #4f7f3a;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #12171b; --panel: #1b2228; --rule: #323c44; --edge: #6d7a85; --soft: #a4b0ba; --ink: #e7ebee; --link: #6cbcd6;
    --on-link: #10191e; --fail: #ff8078; --pass: #4cc38a;
    --m0: #6cbcd6; --m1: #e5ad68; --m2: #b79ee0; --m3: #94c77b;
  }
}
* { box-sizing: border-box; }
[hidden] { display: none !important; }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }
body {
  margin: 0 auto; padding: 1.5rem 1.25rem 3rem; max-width: 72rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; overflow-wrap: anywhere;
}
h1, h2, h3, p, ol, dl, dd, fieldset, figure { margin: 0; padding: 0; }
h1 { font-size: 1.6rem; line-height: 1.2; letter-spacing: -.01em; }
h2 { font-size: 1.1rem; line-height: 1.3; }
h3 { font-size: 1rem; line-height: 1.3; }
header { display: flex; flex-wrap: wrap; align-items: baseline; gap: .25rem 1rem; margin-bottom: 1.25rem; }
header p { color: var(--soft); font-size: .95rem; }
a { color: var(--link); }
main { display: grid; grid-template-columns: minmax(0, 1fr) 21rem; gap: 1.5rem 2.5rem; align-items: start; }
.ask { grid-area: 1 / 1; } .answers { grid-area: 2 / 1; }
.engine {
  grid-area: 1 / 2 / span 2; position: sticky; top: 1.25rem; padding: 1.1rem; border-radius: .6rem; background: var(--panel);
}

label, legend { font-weight: 600; font-size: .9rem; padding: 0; }
label small, .hint { font-weight: 400; color: var(--soft); font-size: .85rem; }
textarea, input {
  font: inherit; color: inherit; background: var(--paper); border: 1px solid var(--edge); border-radius: .4rem;
  padding: .5rem .65rem; width: 100%; min-height: 2.75rem; display: block; margin-top: .25rem;
}
textarea { min-height: 5.5rem; resize: vertical; }
.fields {
  display: grid; grid-template-columns: auto repeat(2, minmax(6rem, 9rem)); gap: .9rem 1.25rem; margin-top: .9rem;
  align-items: end;
}
fieldset { border: 0; min-width: 0; }
.segments { display: flex; margin-top: .25rem; }
.segments label { position: relative; flex: 1; font-weight: 500; font-size: 1rem; }
.segments input { position: absolute; inset: 0; width: 100%; height: 100%; margin: 0; opacity: 0; cursor: pointer; }
.segments span {
  display: grid; place-items: center; min-height: 2.75rem; padding: 0 1rem; border: 1px solid var(--edge); margin-left: -1px;
  white-space: nowrap;
}
.segments label:first-child span { border-radius: .4rem 0 0 .4rem; margin-left: 0; }
.segments label:last-child span { border-radius: 0 .4rem .4rem 0; }
.segments input:checked + span { background: var(--link); border-color: var(--link); color: var(--on-link); font-weight: 600; }
.segments input:focus-visible + span { outline: 3px solid var(--link); outline-offset: 2px; z-index: 1; }
:focus-visible { outline: 3px solid var(--link); outline-offset: 2px; }
details { margin-top: .9rem; }
summary { cursor: pointer; color: var(--link); font-size: .95rem; padding: .35rem 0; width: fit-content; }
.more {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 13rem), 1fr)); gap: .9rem 1.25rem;
  margin-top: .4rem;
}
.buttons { display: flex; flex-wrap: wrap; gap: .6rem; margin-top: 1.1rem; align-items: center; }
button {
  font: inherit; font-weight: 600; min-height: 2.75rem; padding: 0 1.2rem; border-radius: .4rem; cursor: pointer;
  border: 1px solid var(--link); background: transparent; color: var(--link);
}
button.first { background: var(--link); color: var(--on-link); }
button.stop { border-color: var(--fail); color: var(--fail); }
button:disabled { border-color: var(--rule); color: var(--soft); cursor: default; opacity: .65; }
.said { min-height: 1.5rem; margin-top: .6rem; color: var(--soft); font-size: .95rem; }
.said.fault, .fault { color: var(--fail); font-weight: 600; }

.engine header { margin: 0; justify-content: space-between; }
.engine .ready { font-size: .9rem; color: var(--pass); font-weight: 600; }
.engine .ready.fault { color: var(--fail); }
.slots {
  display: grid; grid-template-columns: repeat(auto-fill, minmax(var(--slot, 1.6rem), 1fr)); gap: .3rem;
  margin: .8rem 0 .5rem;
}
.slots i { height: var(--slot, 1.6rem); border-radius: .25rem; border: 1px solid var(--edge); transition: background .2s; }
.slots .runs { background: var(--link); border-color: var(--link); }
.slots .reads {
  border-color: var(--m1); background: repeating-linear-gradient(135deg, var(--m1) 0 3px, transparent 3px 6px);
}
.key { display: flex; flex-wrap: wrap; gap: .2rem 1rem; font-size: .85rem; color: var(--soft); }
.key span { display: flex; gap: .35rem; align-items: center; }
.key i { width: .8rem; height: .8rem; border-radius: .2rem; border: 1px solid var(--edge); }
.key .runs { background: var(--link); border-color: var(--link); }
.key .reads { border-color: var(--m1); background: repeating-linear-gradient(135deg, var(--m1) 0 2px, transparent 2px 4px); }
dl { display: grid; grid-template-columns: 1fr 1fr; gap: .8rem 1rem; margin-top: 1rem; }
dt { font-size: .85rem; color: var(--soft); }
dd { font-size: 1.35rem; line-height: 1.2; font-weight: 600; font-variant-numeric: tabular-nums; }
dd small { font-size: .85rem; font-weight: 400; color: var(--soft); }
.past { margin-top: 1rem; }
.past figcaption { font-size: .85rem; color: var(--soft); }
.past svg { display: block; width: 100%; height: 3.2rem; margin-top: .3rem; border-bottom: 1px solid var(--edge); }
.past polyline { fill: none; stroke: var(--link); stroke-width: 2; vector-effect: non-scaling-stroke; stroke-linejoin: round; }

.answers h2 { padding-top: 1.1rem; border-top: 1px solid var(--rule); }
.answers ol { list-style: none; display: grid; gap: .9rem; margin-top: .8rem; }
.answer { border: 1px solid var(--rule); border-radius: .5rem; padding: .8rem 1rem; min-width: 0; }
.answer header { margin: 0; justify-content: space-between; }
.answer header p { font-size: .85rem; font-variant-numeric: tabular-nums; }
.text { white-space: pre-wrap; margin-top: .5rem; }
.ids { display: flex; flex-wrap: wrap; gap: .2rem; margin-top: .6rem; max-height: 9.5rem; overflow-y: auto; }
.ids span {
  font: .78rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; padding: 0 .35rem; border-radius: .25rem;
  color: var(--tone); border: 1px solid var(--tone);
}
.m0 { --tone: var(--m0); } .m1 { --tone: var(--m1); } .m2 { --tone: var(--m2); } .m3 { --tone: var(--m3); }
.roll { margin-top: .7rem; }
.roll div { overflow-x: auto; }
.roll canvas { display: block; height: 3.5rem; image-rendering: pixelated; border-radius: .2rem; }
.roll figcaption { font-size: .85rem; color: var(--soft); margin-top: .2rem; }
.names { display: flex; flex-wrap: wrap; gap: .2rem 1rem; font-size: .85rem; color: var(--soft); margin-top: .3rem; }
.names span::before {
  content: ""; display: inline-block; width: .7rem; height: .7rem; border-radius: .2rem; background: var(--tone);
  margin-right: .35rem;
}

@media (max-width: 56rem) {
  body { padding: 1rem 1rem 2rem; }
  main { grid-template-columns: minmax(0, 1fr); gap: 1.25rem; }
  .ask, .answers, .engine { grid-area: auto; position: static; }
  .engine dl { grid-template-columns: repeat(auto-fit, minmax(7rem, 1fr)); }
}
@media (max-width: 37.5rem) {
  .fields { grid-template-columns: 1fr 1fr; }
  .fields fieldset { grid-column: 1 / -1; }
  .segments span { padding: 0 .4rem; }
  #shortcut { display: none; }
  .buttons button { flex: 1; padding: 0 .6rem; white-space: nowrap; }
}
@media (prefers-reduced-motion: reduce) { * { transition: none !important; scroll-behavior: auto !important; } }
"""

BODY = """
<header><h1>motrt</h1><p id="about">Asking the server what it serves…</p></header>
<main>
<form class="ask" id="form" aria-label="Ask">
  <label for="prompt">Prompt <small id="prompt-hint">text, or token ids with commas between them</small></label>
  <textarea id="prompt" rows="3" spellcheck="false" aria-describedby="prompt-hint">1, 2, 3</textarea>
  <div class="fields">
    <fieldset><legend>Go on in</legend><div class="segments" id="kinds"></div></fieldset>
    <div><label for="most">Max tokens</label><input id="most" type="number" min="1" value="48" inputmode="numeric"></div>
    <div><label for="temperature">Temperature</label>
      <input id="temperature" type="number" min="0" max="2" step="0.1" value="0.8" inputmode="decimal"></div>
  </div>
  <details><summary>Schedule, seed and key</summary><div class="more">
    <div><label for="schedule">Schedule <small>in place of the buttons</small></label>
      <input id="schedule" placeholder="text:20,audio:10f" spellcheck="false" autocapitalize="off" autocomplete="off"></div>
    <div><label for="seed">Seed <small>empty: a new one each time</small></label>
      <input id="seed" type="number" min="0" inputmode="numeric"></div>
    <div><label for="key">API key <small>kept in this field alone</small></label>
      <input id="key" type="password" autocomplete="off"></div>
  </div></details>
  <div class="buttons">
    <button class="first" type="submit" id="one">Generate</button>
    <button type="button" id="four" aria-label="Generate four at once">Generate &times;4</button>
    <button class="stop" type="button" id="stop" disabled>Stop</button>
    <small class="hint" id="shortcut">Ctrl+Enter generates</small>
  </div>
  <p class="said" id="said" role="status" aria-live="polite"></p>
</form>
<section class="engine" aria-labelledby="engine-title">
  <header><h2 id="engine-title">The running batch</h2><p class="ready" id="ready"></p></header>
  <div class="slots" id="slots" role="img" aria-label="No row is running."></div>
  <p class="key" aria-hidden="true"><span><i class="runs"></i>decoding</span><span><i class="reads"></i>reading its
    prompt</span><span><i></i>free</span></p>
  <dl>
    <div><dt>Rows</dt><dd id="rows">&ndash;</dd></div>
    <div><dt>In the queue</dt><dd id="queue">&ndash;</dd></div>
    <div><dt>Decoded</dt><dd id="rate">&ndash;</dd></div>
    <div><dt>Cache filled</dt><dd id="cache">&ndash;</dd></div>
  </dl>
  <figure class="past"><figcaption id="past-told">Tokens a second, the last half minute</figcaption>
    <svg viewBox="0 0 60 20" preserveAspectRatio="none" aria-hidden="true"><polyline id="past" points=""/></svg></figure>
</section>
<section class="answers" aria-labelledby="answers-title" id="answers" hidden>
  <h2 id="answers-title">Answers</h2><p class="names" id="names"></p><ol id="list"></ol>
</section>
</main>
<noscript><p>This page needs JavaScript; <code>/v1/completions</code> does not.</p></noscript>
"""

SCRIPT = r"""
"use strict";
const at = (id) => document.getElementById(id);
const going = new Set();
const MOST_ANSWERS = 12, MOST_CHIPS = 600, MOST_SLOTS = 128, POLL_MS = 500, PAST = 60;
const RAMP = [[43, 26, 77], [122, 59, 105], [201, 112, 92], [242, 182, 97], [251, 238, 194]];
let facts = null, last = null, past = [], number = 0;

function make(name, kind, text) {
  const made = document.createElement(name);
  if (kind) made.className = kind;
  if (text !== undefined) made.textContent = text;
  return made;
}
function say(sentence, isFault) {
  at("said").textContent = sentence;
  at("said").classList.toggle("fault", Boolean(isFault));
}
function headers() {
  const key = at("key").value.trim();
  return key ? { Authorization: `Bearer ${key}` } : {};
}
async function sentenceOf(response) {
  try {
    const { error } = await response.json();
    if (error && error.message) return ending(String(error.message));
  } catch (_) { /* no JSON: the status is all there is */ }
  return `The server answered with status ${response.status}.`;
}
function ending(sentence) {
  const whole = sentence.charAt(0).toUpperCase() + sentence.slice(1);
  return /[.!?]$/.test(whole) ? whole : `${whole}.`;
}
function unreachable(failure) {
  if (failure instanceof TypeError) return "The server can not be reached: is it still running?";
  return ending(String(failure.message || failure));
}

// The running batch.

async function poll() {
  if (document.visibilityState === "visible") {
    try {
      const response = await fetch("v1/engine", { headers: headers(), cache: "no-store", signal: AbortSignal.timeout(5000) });
      if (response.ok) show(await response.json());
      else lost(await sentenceOf(response));
    } catch (failure) {
      lost(failure.name === "TimeoutError" ? "The server takes long to answer." : unreachable(failure));
    }
  } else last = null;
  setTimeout(poll, POLL_MS);
}
function lost(sentence) {
  last = null;
  at("ready").textContent = "no figures";
  at("ready").classList.add("fault");
  at("about").textContent = sentence;
}
function show(found) {
  const isNew = !facts || facts.model !== found.model;
  facts = found;
  if (isNew) introduce(found);
  const { state, options } = found;
  at("about").textContent = `${found.model} · ${found.weights} · ${found.backend}`;
  at("ready").textContent = found.ready ? "ready" : found.reason;
  at("ready").classList.toggle("fault", !found.ready);
  drawSlots(state.running, state.reading, options.max_batch);
  figure("rows", state.running + state.reading, `of ${options.max_batch}`);
  figure("queue", state.waiting, `of ${options.max_queue}`);
  const filled = state.cache_positions ? Math.round(100 * state.cache_filled / state.cache_positions) : 0;
  figure("cache", `${filled} %`, state.cache_positions ? `of ${state.cache_positions.toLocaleString("en")} positions` : "");
  drawRate(state);
}
function figure(id, value, unit) {
  at(id).replaceChildren(String(value), " ", make("small", "", unit));
}
function drawSlots(running, reading, most) {
  const box = at("slots"), count = Math.min(most, MOST_SLOTS);
  while (box.childElementCount > count) box.lastElementChild.remove();
  while (box.childElementCount < count) box.append(make("i"));
  box.style.setProperty("--slot", count > 32 ? "1rem" : "1.6rem");
  const share = count / most;
  [...box.children].forEach((slot, place) => {
    slot.className = place < running * share ? "runs" : place < (running + reading) * share ? "reads" : "";
  });
  box.setAttribute("aria-label", `${running} of ${most} rows decode, ${reading} read their prompts.`);
}
function drawRate(state) {
  const now = performance.now();
  if (last && now > last.now && state.rows_stepped >= last.rows) {
    past.push((state.rows_stepped - last.rows) * 1000 / (now - last.now));
    past = past.slice(-PAST);
  }
  last = { now, rows: state.rows_stepped };
  const recent = past.slice(-4), mean = recent.reduce((sum, one) => sum + one, 0) / Math.max(1, recent.length);
  figure("rate", mean < 10 ? mean.toFixed(1) : Math.round(mean), "tokens/s");
  const top = Math.max(1, ...past);
  at("past-told").textContent = `Tokens a second, the last half minute: at most ${Math.round(Math.max(0, ...past))}`;
  const start = PAST - past.length + 1;
  at("past").setAttribute("points", past.map((one, place) => `${start + place},${19 - 18 * one / top}`).join(" "));
}
function introduce(found) {
  const names = found.modalities.map((one) => one.name);
  const kinds = names.length > 1 ? [...names, "both"] : names;
  at("kinds").replaceChildren(...kinds.map((name, place) => {
    const label = make("label"), input = make("input");
    Object.assign(input, { type: "radio", name: "kind", value: String(place), checked: place === 0 });
    label.append(input, make("span", "", name.charAt(0).toUpperCase() + name.slice(1)));
    return label;
  }));
  at("names").replaceChildren(...found.modalities.map((one, place) => make("span", `m${place % 4}`, one.name)));
  at("most").max = String(found.limits.max_tokens);
  if (found.has_tokenizer) {
    at("prompt-hint").textContent = "text, or token ids with commas between them";
    if (at("prompt").value === "1, 2, 3") at("prompt").value = "Once upon a time";
  } else at("prompt-hint").textContent = "token ids with commas between them: this bundle has no tokenizer";
  if (location.hash === "#demo" && number === 0) demo();
}

// Asking.

function promptOf() {
  const text = at("prompt").value;
  if (/^\s*\d+(\s*[,\s]\s*\d+)*\s*,?\s*$/.test(text)) return text.split(/[,\s]+/).filter(Boolean).map(Number);
  if (!facts.has_tokenizer) throw new Error("this bundle has no tokenizer: give the prompt as token ids, as in 1, 2, 3");
  if (!text) throw new Error("the prompt is empty: write something, or give token ids");
  return text;
}
function scheduleOf(most) {
  const written = at("schedule").value.trim();
  if (written) return written;
  const chosen = document.querySelector("[name=kind]:checked");
  const place = chosen ? Number(chosen.value) : 0;
  if (place < facts.modalities.length) return facts.modalities[place].name;
  return facts.modalities.slice(0, 2).map((one, which) => {
    const share = which ? Math.floor(most / 2) : Math.ceil(most / 2);
    const frames = Math.max(1, Math.floor(share / one.codes_per_frame));
    return one.name + (one.codes_per_frame > 1 ? `:${frames}f` : `:${share}`);
  }).join(",");
}
function bodyOf(seed) {
  const most = Number(at("most").value), temperature = Number(at("temperature").value);
  if (!(Number.isInteger(most) && most >= 1)) throw new Error("max tokens must be a whole number of at least 1");
  const isRight = at("temperature").value !== "" && temperature >= 0 && temperature <= 2;
  if (!isRight) throw new Error("temperature must be from 0 to 2");
  return {
    model: facts.model, prompt: promptOf(), schedule: scheduleOf(most), max_tokens: most, temperature, seed,
    stream: true, stream_options: { include_usage: true },
  };
}
function generate(count) {
  if (!facts) return say(`Nothing is known of the server yet: ${at("about").textContent}`, true);
  let bodies;
  try {
    const given = at("seed").value === "" ? Math.floor(Math.random() * 2 ** 31) : Number(at("seed").value);
    if (!(Number.isSafeInteger(given) && given >= 0)) throw new Error("a seed must be a whole number of at least 0");
    bodies = [...Array(count).keys()].map((place) => bodyOf(given + place));
  } catch (failure) { return say(ending(failure.message), true); }
  at("answers").hidden = false;
  say(count === 1 ? "One answer is on its way." : `${count} answers are on their way.`);
  for (const body of bodies) ask(body, new Answer(body));
}
async function ask(body, answer) {
  const control = new AbortController();
  going.add(control);
  at("stop").disabled = false;
  try {
    const response = await fetch("v1/completions", {
      method: "POST", signal: control.signal, body: JSON.stringify(body),
      headers: { "Content-Type": "application/json", ...headers() },
    });
    if (!response.ok) return answer.fail(await sentenceOf(response));
    await hear(response.body.getReader(), answer);
    answer.done();
  } catch (failure) {
    if (control.signal.aborted) answer.stopped();
    else answer.fail(unreachable(failure));
  } finally {
    going.delete(control);
    at("stop").disabled = going.size === 0;
    if (going.size === 0 && !at("said").classList.contains("fault")) say("All answers are here.");
  }
}
async function hear(reader, answer) {
  const decoder = new TextDecoder();
  let held = "", isWhole = false;
  for (;;) {
    const { value, done } = await reader.read();
    if (done) break;
    const events = (held + decoder.decode(value, { stream: true })).split("\n\n");
    held = events.pop();
    for (const event of events) {
      const data = event.split("\n").filter((line) => line.startsWith("data:")).map((line) => line.slice(5)).join("").trim();
      if (data === "[DONE]") isWhole = true;
      else if (data) answer.take(JSON.parse(data));
    }
  }
  if (!isWhole) throw new Error("the stream broke off before its end");
}

// An answer.

class Answer {
  constructor(body) {
    this.number = ++number;
    this.started = performance.now();
    this.count = 0; this.frames = []; this.finish = ""; this.first = null; this.fault = "";
    this.box = make("li", "answer");
    const head = make("header");
    this.status = make("p", "", "waiting");
    head.append(make("h3", "", `Answer ${this.number}`), this.status);
    this.text = make("p", "text"); this.text.hidden = true;
    this.ids = make("div", "ids");
    Object.assign(this.ids, { tabIndex: 0, role: "group" });
    this.ids.setAttribute("aria-label", `Token ids of answer ${this.number}`);
    this.box.append(head, make("p", "hint", `${body.schedule} · seed ${body.seed}`), this.text, this.ids);
    this.ids.hidden = true;
    at("list").prepend(this.box);
    while (at("list").childElementCount > MOST_ANSWERS) at("list").lastElementChild.remove();
  }
  take(piece) {
    if (piece.error) { this.fault = ending(String(piece.error.message)); return; }
    const choice = (piece.choices || [])[0];
    if (!choice) return;
    if (this.first === null) this.first = performance.now();
    if (choice.text) { this.text.hidden = false; this.text.append(choice.text); }
    for (const id of choice.token_ids || []) this.chip(id);
    if (choice.audio) this.draw(choice.audio);
    if (choice.finish_detail || choice.finish_reason) this.finish = choice.finish_detail || choice.finish_reason;
    this.tell("streaming");
  }
  chip(id) {
    this.ids.hidden = false;
    this.count += 1;
    if (this.count > MOST_CHIPS) return;
    const place = facts.modalities.findIndex((one) => id >= one.first_id && id < one.end_id);
    const chip = make("span", `m${Math.max(0, place) % 4}`, this.count === MOST_CHIPS ? "…" : String(id));
    if (place >= 0) chip.title = facts.modalities[place].name;
    this.ids.append(chip);
    this.ids.scrollTop = this.ids.scrollHeight;
  }
  draw({ modality, frames }) {
    if (!this.roll) {
      const figure = make("figure", "roll"), scroll = make("div");
      this.roll = make("canvas");
      this.roll.setAttribute("role", "img");
      Object.assign(scroll, { tabIndex: 0, role: "group" });
      scroll.setAttribute("aria-label", `Audio codes of answer ${this.number}`);
      this.caption = make("figcaption");
      scroll.append(this.roll);
      figure.append(scroll, this.caption);
      this.box.append(figure);
    }
    this.frames.push(...frames);
    const kind = facts.modalities.find((one) => one.name === modality) || { first_id: 0, end_id: 2048 };
    paint(this.roll, this.frames, kind.end_id - kind.first_id);
    this.roll.parentElement.scrollLeft = this.roll.parentElement.scrollWidth;
    const seconds = kind.frames_per_second ? `, ${(this.frames.length / kind.frames_per_second).toFixed(2)} s of sound` : "";
    this.caption.textContent = `${this.frames.length} frames of ${frames[0].length} codes${seconds}; dark is a low code`;
    this.roll.setAttribute("aria-label", `A strip of ${this.frames.length} frames of ${frames[0].length} ${modality} codes`);
  }
  tell(word) {
    const now = performance.now(), parts = [word, `${this.count} token${this.count === 1 ? "" : "s"}`];
    if (this.first !== null) {
      parts.push(`first after ${((this.first - this.started) / 1000).toFixed(2)} s`);
      if (this.count > 2) parts.push(`${((this.count - 1) * 1000 / Math.max(1, now - this.first)).toFixed(1)} tokens/s`);
    }
    this.status.textContent = parts.join(" · ");
  }
  done() {
    if (this.fault) return this.fail(this.fault);
    const ends = { length: "done, at max tokens", stop: "done, at a stop id", deadline: "ended: its time was up" };
    this.tell(ends[this.finish] || "done");
  }
  stopped() { this.tell("stopped"); }
  fail(sentence) {
    this.tell("ended");
    this.box.append(make("p", "fault", sentence));
    say(sentence, true);
  }
}
function paint(canvas, frames, size) {
  const width = 11, height = 14, rows = frames[0].length;
  canvas.width = frames.length * width; canvas.height = rows * height;
  const pen = canvas.getContext("2d");
  frames.forEach((frame, column) => frame.forEach((code, row) => {
    pen.fillStyle = colour(code / Math.max(1, size - 1));
    pen.fillRect(column * width, row * height, width - 1, height - 1);
  }));
}
function colour(share) {
  const place = Math.min(1, Math.max(0, share)) * (RAMP.length - 1), low = Math.min(RAMP.length - 2, Math.floor(place));
  const mixed = RAMP[low].map((one, which) => Math.round(one + (RAMP[low + 1][which] - one) * (place - low)));
  return `rgb(${mixed.join(",")})`;
}
function demo() {
  const kinds = document.querySelectorAll("[name=kind]");
  kinds[kinds.length - 1].checked = true;
  generate(4);
}

at("form").addEventListener("submit", (event) => { event.preventDefault(); generate(1); });
at("four").addEventListener("click", () => generate(4));
at("stop").addEventListener("click", () => { say("Stopped."); for (const control of going) control.abort(); });
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); generate(1); }
});
poll();
"""


def _hash(content: str) -> str:
    return f"'sha256-{b64encode(sha256(content.encode()).digest()).decode()}'"


@cache
def page() -> str:
    """The whole page, as HTML."""
    policy = "; ".join(
        (
            "default-src 'none'",
            f"script-src {_hash(SCRIPT)}",
            f"style-src {_hash(STYLE)}",
            "connect-src 'self'",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
        )
    )
    head = (
        '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="referrer" content="no-referrer">',
        '<link rel="icon" href="data:,">',
        "<title>motrt</title>",
        f"<style>{STYLE}</style>",
    )
    start = '<!doctype html>\n<html lang="en">\n<head>\n' + "\n".join(head)
    return f"{start}\n</head>\n<body>{BODY}<script>{SCRIPT}</script>\n</body>\n</html>\n"
