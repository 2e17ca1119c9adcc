// Sampling settings: a form whose empty fields leave the decision to the server. Kept in the browser, key excepted.

const KEPT = "atoma-jax settings";

export class Settings {
  #form;

  constructor(form) {
    this.#form = form;
    for (const [name, value] of Object.entries(this.#read())) {
      const field = form.elements.namedItem(name);
      if (field) field.value = value;
    }
    form.addEventListener("input", () => this.#write());
    form.addEventListener("reset", () => setTimeout(() => this.#write()));
    form.addEventListener("submit", (event) => event.preventDefault());
  }

  /** Whether every field is within its limits; shows the first that is not. */
  get valid() {
    return this.#form.reportValidity();
  }

  /** What the model is told first. */
  get system() {
    return this.#form.elements.namedItem("system").value.trim();
  }

  /** Fields of a request. */
  get fields() {
    const fields = {};
    for (const input of this.#form.querySelectorAll("input")) {
      if (input.value === "") continue;
      fields[input.name] = input.type === "number" ? input.valueAsNumber : input.value;
    }
    return fields;
  }

  #read() {
    try {
      return JSON.parse(localStorage.getItem(KEPT)) ?? {};
    } catch {
      return {};
    }
  }

  #write() {
    localStorage.setItem(KEPT, JSON.stringify(Object.fromEntries(new FormData(this.#form))));
  }
}
