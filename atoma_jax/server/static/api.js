// The server's API: what is asked, and what comes back. Paths are relative, so that the page works below any prefix.

const KEY = "atoma-jax key"; // kept in this tab alone

export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

export const key = {
  get: () => sessionStorage.getItem(KEY),
  set: (value) => sessionStorage.setItem(KEY, value),
};

async function call(path, options = {}) {
  const headers = { ...options.headers };
  if (key.get()) headers.Authorization = `Bearer ${key.get()}`;
  let response;
  try {
    response = await fetch(path, { cache: "no-store", credentials: "omit", ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, "The server does not answer. Is it still running?");
  }
  if (response.ok) return response;
  let message = `The server answered ${response.status}.`;
  try {
    message = (await response.json()).error.message ?? message;
  } catch { /* no JSON: the status has to do */ }
  throw new ApiError(response.status, message);
}

/** The card of the model that is served. */
export async function model() {
  return (await (await call("v1/models")).json()).data[0];
}

/** Text of `/metrics`. */
export async function metrics() {
  return (await call("metrics")).text();
}

/** What the server says of itself: loading, ready, draining, stalled or dead. */
export async function state() {
  try {
    const response = await fetch("ready", { cache: "no-store" });
    return response.headers.get("X-State") ?? "unreachable";
  } catch {
    return "unreachable";
  }
}

/** Chunks of an answer, as they come. Ends early, with an AbortError, where `signal` says so. */
export async function* answer(body, signal) {
  const response = await call("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true, continuous_usage_stats: true } }),
    signal,
  });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let left = "";
  while (true) {
    const { value, done } = await reader.read();
    if (done) throw new ApiError(0, "The connection broke off.");
    const events = (left + value).split("\n\n");
    left = events.pop();
    for (const event of events) {
      if (!event.startsWith("data: ")) continue;
      if (event === "data: [DONE]") return;
      const chunk = JSON.parse(event.slice(6));
      if (chunk.error) throw new ApiError(chunk.error.code, chunk.error.message);
      yield chunk;
    }
  }
}
