// The talk: turns of a question and its answer, one of which may be on its way.

import * as api from "./api.js";
import { byId, copyButton, element, setText } from "./dom.js";
import { Markdown } from "./markdown.js";

const ENDS = { length: "cut at the limit of tokens", stopped: "stopped" };

export class Chat {
  #turns = [];
  #settings;
  #running = null; // what stops the answer that is on its way
  #onBusy;
  #onKey;

  constructor(settings, { onBusy, onKey }) {
    this.#settings = settings;
    this.#onBusy = onBusy;
    this.#onKey = onKey;
  }

  get busy() {
    return this.#running !== null;
  }

  stop() {
    this.#running?.abort();
  }

  clear() {
    this.stop();
    this.#turns = [];
    byId("turns").replaceChildren();
    byId("empty").hidden = false;
  }

  async ask(question) {
    byId("empty").hidden = true;
    const turn = { question, text: "", node: element("article", { class: "turn" }) };
    turn.node.append(element("div", { class: "mine" }, question));
    byId("turns").append(turn.node);
    this.#turns.push(turn);
    await this.#answer(turn);
  }

  /** The last question once more. */
  async #again(turn) {
    if (this.busy) return;
    while (turn.node.children.length > 1) turn.node.lastElementChild.remove();
    turn.text = "";
    await this.#answer(turn);
  }

  /** Turns without an answer are not part of the talk: no template expects two questions in a row. */
  #messages(turn) {
    const told = this.#turns.slice(0, this.#turns.indexOf(turn)).filter((past) => past.text);
    const messages = told.flatMap((past) => [
      { role: "user", content: past.question },
      { role: "assistant", content: past.text },
    ]);
    const system = this.#settings.system ? [{ role: "system", content: this.#settings.system }] : [];
    return [...system, ...messages, { role: "user", content: turn.question }];
  }

  async #answer(turn) {
    const node = element("div", { class: "answer live", "aria-busy": "true" });
    const foot = element("div", { class: "foot" });
    turn.node.append(node, foot);
    this.#running = new AbortController();
    this.#onBusy(true);
    follow(true);
    const show = new Painter(new Markdown(node), foot);
    let end = "";
    try {
      const asked = { ...this.#settings.fields, messages: this.#messages(turn) };
      show.begin();
      for await (const chunk of api.answer(asked, this.#running.signal)) {
        const choice = chunk.choices[0];
        const piece = choice?.delta?.content ?? "";
        turn.text += piece;
        end = choice?.finish_reason ?? end;
        show.take(piece, chunk.usage);
      }
    } catch (error) {
      if (error.name === "AbortError") end = "stopped";
      else this.#fail(turn, error);
    }
    show.finish(ENDS[end]);
    node.classList.remove("live");
    node.removeAttribute("aria-busy");
    this.#running = null;
    this.#onBusy(false);
    if (turn.text) foot.append(copyButton(() => turn.text));
    for (const old of byId("turns").querySelectorAll(".again")) old.remove();
    foot.append(element("button", { type: "button", class: "link again", click: () => this.#again(turn) }, "Again"));
    setText(byId("announce"), turn.text ? `Answer: ${turn.text}` : "No answer.");
    follow();
  }

  #fail(turn, error) {
    turn.node.lastElementChild.before(element("p", { class: "problem", role: "alert" }, error.message ?? String(error)));
    if (error.status === 401) this.#onKey();
  }
}

/** Shows what came, once a frame, with the numbers below it. */
class Painter {
  #markdown;
  #foot;
  #numbers = element("span", { class: "numbers" });
  #pending = "";
  #frame = 0;
  #start = 0;
  #first = 0;
  #last = 0;
  #tokens = 0;

  constructor(markdown, foot) {
    this.#markdown = markdown;
    this.#foot = foot;
  }

  begin() {
    this.#start = performance.now();
    this.#foot.append(this.#numbers);
  }

  take(piece, usage) {
    this.#pending += piece;
    if (usage && usage.completion_tokens > this.#tokens) {
      this.#last = performance.now();
      this.#first ||= this.#last;
      this.#tokens = usage.completion_tokens;
    }
    this.#frame ||= requestAnimationFrame(() => this.#paint());
  }

  finish(note) {
    cancelAnimationFrame(this.#frame);
    this.#paint(note);
  }

  #paint(note) {
    this.#frame = 0;
    if (this.#pending) this.#markdown.append(this.#pending);
    this.#pending = "";
    const parts = [];
    if (this.#tokens) {
      parts.push(`${this.#tokens} ${this.#tokens === 1 ? "token" : "tokens"}`);
      const seconds = (this.#last - this.#first) / 1000;
      if (seconds > 0) parts.push(`${((this.#tokens - 1) / seconds).toFixed(1)} tokens/s`);
      parts.push(`first after ${span(this.#first - this.#start)}`);
    }
    if (note) parts.push(note);
    setText(this.#numbers, parts.join(" · "));
    follow();
  }
}

const span = (milliseconds) => (milliseconds < 1000 ? `${Math.round(milliseconds)} ms` : `${(milliseconds / 1000).toFixed(2)} s`);

/** Keeps the end in sight for who has it in sight, and for nobody else. */
let following = true;
export function follow(always = false) {
  if (always) following = true;
  const scroll = byId("scroll");
  if (following) scroll.scrollTop = scroll.scrollHeight;
  byId("latest").hidden = following;
}
export function watchScrolling() {
  const scroll = byId("scroll");
  let top = 0;
  scroll.addEventListener("scroll", () => {
    const near = scroll.scrollHeight - scroll.scrollTop - scroll.clientHeight < 40;
    if (near) following = true;
    else if (scroll.scrollTop < top) following = false; // upwards: only a reader does that
    top = scroll.scrollTop;
    byId("latest").hidden = following || near;
  }, { passive: true });
  byId("latest").addEventListener("click", () => follow(true));
}
