const { tokens, scale, views } = JSON.parse(document.getElementById("data").textContent);
const details = document.getElementById("details");
const hint = details.firstElementChild;
const announcement = document.getElementById("announcement");
const models = ["teacher", "student"];

/* Text goes in as text nodes: a token is whatever a model has in its vocabulary. */
function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("--")) made.style.setProperty(name, value);
    else made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

const clamp = (x) => Math.min(Math.max(x, 0), 1);
const fraction = (weight) => (Number.isFinite(Number(weight)) ? clamp(weight / scale) : 0);
const rounded = (x, digits) => (Number.isFinite(Number(x)) ? Number(x).toFixed(digits) : String(x));

function percent(p) {
  if (!Number.isFinite(Number(p))) return String(p);
  if (p > 0 && p < 0.001) return "<0.1 %";
  return `${(100 * p).toFixed(p < 0.0995 ? 1 : 0)} %`;
}

/* A token on its own, where spaces and line breaks would not show. */
const SIGNS = { " ": "␣", "\n": "↵", "\t": "⇥", "\x7f": "␡" };

function sign(character) {
  const code = character.codePointAt(0);
  if (character in SIGNS) return SIGNS[character];
  return code < 0x20 ? String.fromCodePoint(0x2400 + code) : `U+${code.toString(16).toUpperCase().padStart(4, "0")}`;
}

const visible = (text) => (text === "" ? "∅" : text.replace(/[\p{Cc}\p{Cf}\p{Cs}\p{Z}]/gu, sign));

/* A token in its passage, where line breaks get a sign; one in the midst of a paragraph breaks no line, as the page has
   a width of its own. */
const whole = tokens.join("");
const inParagraph = (at) => /\S/.test(whole[at - 1] ?? "") && /[^\s*]/.test(whole[at + 1] ?? "");

function inPassage(token, start) {
  let at = start;
  return token.split(/(\n)/).flatMap((part) => {
    const place = at;
    at += part.length;
    if (part !== "\n") return [part.replace(/[^\P{Cc}\t]/gu, sign)];
    return [element("span", { class: "glyph", "aria-hidden": "true" }, "↵"), inParagraph(place) ? " " : "\n"];
  });
}

function shading(row) {
  if (row === null) return { class: "token unweighted", "--w": 0 };
  const kind = Number.isFinite(Number(row.weight)) ? "token" : "token not-finite";
  return { class: kind, "--w": fraction(row.weight) };
}

function drawHistogram(view, tallest) {
  const shares = view.histogram.map((count) => element("span", { "--share": tallest ? count / tallest : 0 }));
  const shades = Array.from({ length: 48 }, (_, i) => element("span", { "--w": (i + 0.5) / 48 }));
  const ticks = [0, 0.25, 0.5, 0.75, 1].map((x) => element("span", {}, String(Number((x * scale).toPrecision(3)))));
  const counts = view.histogram.map((n, i) => [n, i]).filter(([n]) => n > 0);
  const end = (i) => rounded((i * scale) / view.histogram.length, 3);
  const told = counts.map(([n, i]) => `${n} from ${end(i)} to ${end(i + 1)}`).join(", ");
  return element(
    "div",
    { class: "histogram", role: "img", "aria-label": `Histogram of w, tokens by weight: ${told || "none"}` },
    element("div", { class: "height" }, `${tallest} ${tallest === 1 ? "token" : "tokens"}`),
    element("div", { class: "bars" }, ...shares),
    element("div", { class: "scale" }, ...shades),
    element("div", { class: "ticks" }, ...ticks),
  );
}

function drawView(view, tallest) {
  const passage = element("div", {
    class: "passage",
    role: "listbox",
    dir: "auto",
    "aria-label": `Passage, ${view.label}`,
  });
  let start = 0;
  tokens.forEach((token, i) => {
    const option = { ...shading(view.rows[i]), role: "option", tabindex: i === 0 ? 0 : -1, "aria-selected": "false" };
    passage.append(element("span", option, ...inPassage(token, start)));
    start += token.length;
  });
  const heading = [element("h2", {}, view.label), element("p", { class: "summary" }, view.summary)];
  return element("section", { class: "view" }, ...heading, drawHistogram(view, tallest), passage);
}

function measurements(i) {
  const cell = (read) => views.map(({ rows }) => element("td", {}, rows[i] ? read(rows[i]) : "–"));
  const line = (name, read) => element("tr", {}, element("th", { scope: "row" }, name), ...cell(read));
  const heads = views.map(({ label }) => element("th", { scope: "col" }, label));
  return element(
    "table",
    {},
    element("caption", {}, "Entropies in nats; p is the probability of the token that stands here."),
    element("thead", {}, element("tr", {}, element("td"), ...heads)),
    element(
      "tbody",
      {},
      line("Weight w", (row) => rounded(row.weight, 3)),
      line("Teacher, entropy", (row) => rounded(row.teacher.entropy, 2)),
      line("Student, entropy", (row) => rounded(row.student.entropy, 2)),
      line("Teacher, p", (row) => percent(row.teacher.probability)),
      line("Student, p", (row) => percent(row.student.probability)),
    ),
  );
}

function prediction(heading, { candidates }, own) {
  const items = candidates.map(({ text, probability }) =>
    element(
      "li",
      { class: text === own ? "own" : "", "--p": clamp(Number(probability) || 0) },
      element("span", { class: "candidate", title: visible(text) }, visible(text)),
      element("span", { class: "percent" }, percent(probability)),
    ),
  );
  return element("section", { class: "prediction" }, element("h3", {}, heading), element("ol", {}, ...items));
}

/* The teacher is the same for every view. */
function predictions(i) {
  const known = views.filter(({ rows }) => rows[i] !== null);
  const students = known.map(({ label, rows }) => prediction(`Student, ${label}`, rows[i].student, tokens[i]));
  return element(
    "div",
    { class: "predictions" },
    prediction("Teacher", known[0].rows[i].teacher, tokens[i]),
    ...students,
  );
}

function sentence(view, i) {
  const row = views[view].rows[i];
  const token = `Token ${i + 1} of ${tokens.length}, “${visible(tokens[i])}”, ${views[view].label}`;
  if (row === null) return `${token}: nothing predicts it.`;
  const said = models.map((model) => {
    const { entropy, candidates } = row[model];
    const first = candidates.length
      ? `, expects “${visible(candidates[0].text)}”, ${percent(candidates[0].probability)}`
      : "";
    return `${model}: entropy ${rounded(entropy, 2)} nats${first}`;
  });
  return `${token}: weight ${rounded(row.weight, 3)}; ${said.join("; ")}.`;
}

/* What is chosen stays; what is pointed at shows for as long as it is pointed at. */
let chosen = null;
const drawn = [];

function show(place) {
  for (const marked of document.querySelectorAll(".current, .twin, .has-current"))
    marked.classList.remove("current", "twin", "has-current");
  document.body.classList.toggle("open", place !== null);
  if (place === null) return details.replaceChildren(hint);
  const { view, i } = place;
  drawn.forEach(({ spans, bars }, other) => {
    spans[i].classList.add(other === view ? "current" : "twin");
    const row = views[other].rows[i];
    if (row && Number.isFinite(Number(row.weight))) {
      bars[Math.min(Math.floor(fraction(row.weight) * bars.length), bars.length - 1)].classList.add("has-current");
    }
  });
  const subject = element("p", { class: "subject" }, element("span", shading(views[view].rows[i]), visible(tokens[i])));
  subject.append(element("span", { class: "place" }, `token ${i + 1} of ${tokens.length}`));
  const unknown = views.every(({ rows }) => rows[i] === null);
  const rest = unknown
    ? [element("p", { class: "hint" }, "Nothing predicts this token.")]
    : [measurements(i), predictions(i)];
  details.replaceChildren(subject, ...rest);
  document.body.style.setProperty("--sheet", `${details.parentElement.offsetHeight}px`);
}

function choose(view, i) {
  const { spans } = drawn[view];
  if (chosen) drawn[chosen.view].spans[chosen.i].setAttribute("aria-selected", "false");
  for (const span of spans) if (span.tabIndex === 0) span.tabIndex = -1;
  spans[i].tabIndex = 0;
  spans[i].setAttribute("aria-selected", "true");
  chosen = { view, i };
  show(chosen);
}

function dismiss() {
  if (chosen) drawn[chosen.view].spans[chosen.i].setAttribute("aria-selected", "false");
  chosen = null;
  show(null);
}

/* The token nearest below or above: on another line, the least far to the side. */
function nearest(spans, i, down) {
  const at = spans[i].getClientRects()[0];
  const rects = spans.map((span) => span.getClientRects()[0]);
  const beyond = rects.map((r) => (down ? r.top - at.top : at.top - r.top));
  const line = Math.min(...beyond.filter((d) => d > at.height / 2));
  if (!Number.isFinite(line)) return i;
  const distance = (j) => (Math.abs(beyond[j] - line) < at.height / 2 ? Math.abs(rects[j].left - at.left) : Infinity);
  return spans.map((_, j) => j).reduce((best, j) => (distance(j) < distance(best) ? j : best));
}

function target(key, spans, i) {
  const moves = {
    ArrowLeft: () => Math.max(i - 1, 0),
    ArrowRight: () => Math.min(i + 1, spans.length - 1),
    ArrowUp: () => nearest(spans, i, false),
    ArrowDown: () => nearest(spans, i, true),
    Home: () => 0,
    End: () => spans.length - 1,
  };
  return moves[key]?.();
}

function listen(view) {
  const { passage, spans } = drawn[view];
  const index = (event) => spans.indexOf(event.target.closest(".token"));
  const enter = (i) => {
    choose(view, i);
    announcement.textContent = sentence(view, i);
  };
  const goTo = (i) => {
    if (document.activeElement === spans[i]) enter(i);
    spans[i].focus({ preventScroll: true });
    spans[i].scrollIntoView({ block: "nearest" });
  };
  passage.addEventListener("focusin", (event) => index(event) >= 0 && enter(index(event)));
  passage.addEventListener("click", (event) => index(event) >= 0 && goTo(index(event)));
  passage.addEventListener("keydown", (event) => {
    const i = index(event);
    const next = i < 0 || event.ctrlKey || event.metaKey || event.altKey ? undefined : target(event.key, spans, i);
    if (next === undefined) return;
    event.preventDefault();
    goTo(next);
  });
  passage.addEventListener("pointerover", (event) => {
    const i = index(event);
    if (event.pointerType !== "mouse" || i < 0) return;
    show({ view, i });
    // Details that come to lie over the token would take the click away from it.
    if (details.parentElement.contains(document.elementFromPoint(event.clientX, event.clientY))) show(chosen);
  });
  passage.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && show(chosen));
}

const tallest = Math.max(1, ...views.flatMap(({ histogram }) => histogram));
views.forEach((view, number) => {
  const section = drawView(view, tallest);
  document.getElementById("views").append(section);
  drawn.push({
    passage: section.querySelector(".passage"),
    spans: [...section.querySelectorAll(".passage > .token")],
    bars: [...section.querySelectorAll(".bars > span")],
  });
  listen(number);
});
document.getElementById("close").addEventListener("click", dismiss);
document.addEventListener("keydown", (event) => event.key === "Escape" && dismiss());

/* Beside the passage there is room for an example of what the panel shows. */
const weights = views.length ? views.at(-1).rows.map((row) => (row ? fraction(row.weight) : -1)) : [];
if (Math.max(...weights) >= 0 && matchMedia("(min-width: 64rem)").matches) {
  choose(views.length - 1, weights.indexOf(Math.max(...weights)));
}
