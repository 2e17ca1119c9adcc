// The live view of the engine: what runs, what waits, how full the KV cache is, and how many tokens come a second.

import * as api from "./api.js";
import { byId, setText } from "./dom.js";

const EVERY = 1000; // milliseconds
const KEPT = 120; // readings in the curve
const NAMES = ["vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc", "vllm:generation_tokens_total"];

/** The values of some series in Prometheus's text, each summed over its labels. */
export function parse(text) {
  const found = Object.fromEntries(NAMES.map((name) => [name, null]));
  for (const line of text.split("\n")) {
    const name = line.slice(0, line.search(/[{ ]/));
    if (name in found) found[name] = (found[name] ?? 0) + Number(line.slice(line.lastIndexOf(" ") + 1));
  }
  const [running, waiting, kv, tokens] = NAMES.map((name) => found[name]);
  return { running, waiting, kv, tokens };
}

export class Monitor {
  #rates = [];
  #before = null;
  #timer = null;

  start() {
    document.addEventListener("visibilitychange", () => this.#next(0));
    this.#next(0);
  }

  #next(delay) {
    clearTimeout(this.#timer);
    if (!document.hidden) this.#timer = setTimeout(() => this.#look(), delay);
    else this.#before = null; // nobody looks: no requests, and no rate over the gap
  }

  async #look() {
    const state = await api.state();
    const pill = byId("state");
    pill.dataset.state = state;
    setText(pill.lastElementChild, state);
    if (state !== "unreachable") {
      try {
        this.#show(parse(await api.metrics()), performance.now());
      } catch { /* the next look may tell more */ }
    }
    this.#next(EVERY);
  }

  #show(now, time) {
    if (now.tokens === null) return;
    setText(byId("running"), String(now.running));
    setText(byId("waiting"), String(now.waiting));
    const percent = now.kv * 100;
    setText(byId("kv"), `${percent < 10 && percent > 0 ? percent.toFixed(1) : Math.round(percent)} %`);
    byId("kv-meter").setAttribute("aria-valuenow", percent.toFixed(1));
    byId("kv-meter").firstElementChild.style.width = `${percent}%`;
    if (this.#before && now.tokens >= this.#before.tokens) {
      const rate = (now.tokens - this.#before.tokens) / ((time - this.#before.time) / 1000);
      this.#rates = [...this.#rates, rate].slice(-KEPT);
      setText(byId("rate"), rate < 10 && rate > 0 ? rate.toFixed(1) : String(Math.round(rate)));
      this.#draw();
    }
    this.#before = { tokens: now.tokens, time };
  }

  #draw() {
    const peak = Math.max(...this.#rates, 1);
    const points = this.#rates.map((rate, at) => `${KEPT - this.#rates.length + at + 1},${(31 - (29 * rate) / peak).toFixed(1)}`);
    const [area, line] = byId("spark").children;
    line.setAttribute("points", points.join(" "));
    area.setAttribute("points", [`${KEPT - this.#rates.length + 1},32`, ...points, `${KEPT},32`].join(" "));
    setText(byId("peak"), `peak ${Math.round(Math.max(...this.#rates))}`);
  }
}
