// Joins the parts of the page: the composer, the key, the panel. Each part is a module of its own.

import * as api from "./api.js";
import { Chat, watchScrolling } from "./chat.js";
import { byId, setText } from "./dom.js";
import { Monitor } from "./monitor.js";
import { Settings } from "./settings.js";

const prompt = byId("prompt");
const chat = new Chat(new Settings(byId("settings")), { onBusy: showBusy, onKey: () => askForKey("This key is not known here.") });
const settings = byId("settings");

function showBusy(busy) {
  byId("stop").hidden = !busy;
  byId("send").hidden = busy;
  if (!busy && document.activeElement === document.body) prompt.focus();
  fit();
}

/** As high as its text where the browser does not do that by itself; nothing to send, no button. */
function fit() {
  byId("send").disabled = !prompt.value.trim();
  if (CSS.supports("field-sizing", "content")) return;
  prompt.style.height = "auto";
  prompt.style.height = `${prompt.scrollHeight}px`;
}

function send() {
  const question = prompt.value.trim();
  if (!question || chat.busy) return;
  if (!settings.checkValidity()) {
    openPanel(true);
    settings.reportValidity();
    return;
  }
  prompt.value = "";
  chat.ask(question);
}

function openPanel(open) {
  byId("panel").classList.toggle("open", open);
  byId("panel-toggle").setAttribute("aria-expanded", String(open));
}

function askForKey(problem) {
  setText(byId("key-problem"), problem);
  byId("key-button").hidden = false;
  byId("key").value = "";
  if (!byId("key-dialog").open) byId("key-dialog").showModal();
}

/** Asks until the server says what it serves: it may be loading, and it may want a key. */
async function greet() {
  try {
    const model = await api.model();
    setText(byId("model"), model.id.split("/").at(-1));
    byId("model").title = `${model.id}, up to ${model.max_model_len} tokens`;
    document.title = `${model.id.split("/").at(-1)} · atoma-jax`;
    return;
  } catch (error) {
    if (error.status === 401) {
      askForKey(api.key.get() ? "This key is not known here." : "");
      return;
    }
  }
  setTimeout(greet, 1000);
}

byId("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
prompt.addEventListener("input", fit);
prompt.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    send();
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && chat.busy && !byId("key-dialog").open) chat.stop();
});
byId("stop").addEventListener("click", () => chat.stop());
byId("new-chat").addEventListener("click", () => {
  chat.clear();
  prompt.focus();
});
byId("ideas").addEventListener("click", (event) => {
  if (event.target.tagName !== "BUTTON" || chat.busy) return;
  prompt.value = event.target.textContent;
  send();
});
byId("panel-toggle").addEventListener("click", () => openPanel(!byId("panel").classList.contains("open")));
byId("key-button").addEventListener("click", () => askForKey(""));
byId("key-form").addEventListener("submit", () => {
  api.key.set(byId("key").value.trim());
  greet();
});

watchScrolling();
new Monitor().start();
fit();
greet();
