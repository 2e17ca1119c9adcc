// Markdown as models write it, as elements, while it streams: blocks that are over stay, the last one is made anew.
// Paragraphs, headings, lists, quotes, rules, fences, bold, italics and code. Links and HTML are shown as their text.

import { copyButton, element } from "./dom.js";

const FENCE = /^\s{0,3}(`{3,}|~{3,})\s*([\w+#.-]*)[^`]*$/;
const HEADING = /^(#{1,6})\s+(.*)$/;
const RULE = /^\s{0,3}([-*_])(\s*\1){2,}\s*$/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/;
const INLINE = /(`+)([^`]|[^`].*?[^`])\1(?!`)|\*\*(?=\S)(.+?\S?)\*\*|(?<![\w*])\*(?=[^\s*])([^*]*[^\s*])\*(?!\*)|(?<!\w)_(?=[^\s_])([^_]*[^\s_])_(?!\w)/g;

export class Markdown {
  #root;
  #text = "";
  #settled = 0; // characters of blocks that are over
  #open = []; // elements of what may still change

  constructor(root) {
    this.#root = root;
  }

  append(text) {
    this.#text += text;
    for (const node of this.#open) node.remove();
    const end = settledEnd(this.#text, this.#settled);
    if (end > this.#settled) {
      this.#root.append(...blocks(this.#text.slice(this.#settled, end)));
      this.#settled = end;
    }
    this.#open = blocks(this.#text.slice(this.#settled));
    this.#root.append(...this.#open);
  }
}

/** Where the last block begins: after a blank line outside of fences. Lists may go on after one, so they stay open. */
function settledEnd(text, start) {
  let end = start, at = start, fence = null, list = false;
  while (true) {
    const stop = text.indexOf("\n", at);
    if (stop < 0) return end;
    const line = text.slice(at, stop);
    at = stop + 1;
    const mark = FENCE.exec(line);
    if (fence) {
      if (mark && mark[1].startsWith(fence) && !mark[2]) { fence = null; if (!list) end = at; }
    } else if (mark) {
      fence = mark[1];
    } else if (!line.trim()) {
      if (!list) end = at;
    } else {
      const next = ITEM.test(line) || (list && /^\s/.test(line));
      if (list && !next) end = at - line.length - 1;
      list = next;
    }
  }
}

function blocks(text) {
  const made = [], lines = text.split("\n");
  let paragraph = [];
  const flush = () => {
    if (paragraph.length) made.push(element("p", {}, ...inline(paragraph.join("\n"))));
    paragraph = [];
  };
  for (let at = 0; at < lines.length; at++) {
    const line = lines[at];
    let mark;
    if ((mark = FENCE.exec(line))) {
      flush();
      const body = [];
      for (at++; at < lines.length; at++) {
        const close = FENCE.exec(lines[at]);
        if (close && close[1].startsWith(mark[1]) && !close[2]) break;
        body.push(lines[at]);
      }
      made.push(codeBlock(mark[2], body.join("\n")));
    } else if (!line.trim()) {
      flush();
    } else if ((mark = HEADING.exec(line))) {
      flush();
      made.push(element(mark[1].length < 3 ? "h3" : "h4", {}, ...inline(mark[2])));
    } else if (RULE.test(line)) {
      flush();
      made.push(element("hr"));
    } else if (ITEM.test(line)) {
      flush();
      let end = at + 1;
      while (end < lines.length && (ITEM.test(lines[end]) || /^\s+\S/.test(lines[end])
        || (!lines[end].trim() && end + 1 < lines.length && (ITEM.test(lines[end + 1]) || /^\s+\S/.test(lines[end + 1]))))) end++;
      made.push(list(lines.slice(at, end)));
      at = end - 1;
    } else if (line.startsWith(">")) {
      flush();
      const body = [];
      for (; at < lines.length && lines[at].startsWith(">"); at++) body.push(lines[at].replace(/^>\s?/, ""));
      at--;
      made.push(element("blockquote", {}, ...blocks(body.join("\n"))));
    } else {
      paragraph.push(line);
    }
  }
  flush();
  return made;
}

/** A list and what is indented below its items. */
function list(lines) {
  const [, indent, bullet] = ITEM.exec(lines[0]);
  const ordered = /\d/.test(bullet);
  const made = element(ordered ? "ol" : "ul", ordered ? { start: String(parseInt(bullet, 10)) } : {});
  let body = [];
  const flush = () => {
    if (!body.length) return;
    const [head, ...rest] = body;
    const shift = Math.min(...rest.filter((line) => line.trim()).map((line) => /^\s*/.exec(line)[0].length), 99);
    made.append(element("li", {}, ...inline(head), ...blocks(rest.map((line) => line.slice(shift)).join("\n"))));
    body = [];
  };
  for (const line of lines) {
    const mark = ITEM.exec(line);
    if (mark && mark[1].length <= indent.length) {
      flush();
      body = [mark[3]];
    } else {
      body.push(line);
    }
  }
  flush();
  return made;
}

function codeBlock(language, text) {
  return element("div", { class: "block" },
    element("header", {}, element("span", {}, language || "code"), copyButton(() => text)),
    element("pre", { tabindex: "0" }, element("code", {}, text)));
}

function inline(text) {
  const made = [];
  let from = 0;
  for (const found of text.matchAll(INLINE)) {
    const [whole, , code, bold, star, under] = found;
    if (found.index > from) made.push(text.slice(from, found.index));
    if (code !== undefined) made.push(element("code", {}, code));
    else if (bold !== undefined) made.push(element("strong", {}, ...inline(bold)));
    else made.push(element("em", {}, ...inline(star ?? under)));
    from = found.index + whole.length;
  }
  if (from < text.length) made.push(text.slice(from));
  return made;
}
