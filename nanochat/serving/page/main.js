// The page: tabs, questions and answers, and what the words of an answer looked at.

import { ask, getJson, messagesAbout, postJson } from "./api.js";
import { compareTab } from "./compare.js";
import { Pictures } from "./pictures.js";
import { robotTab } from "./robot.js";

const $ = (id) => document.getElementById(id);
let models = [];
let running = null; // AbortController of the answer that streams
let looked = null; // what /attention said about the last answer

export function problem(text) {
  $("problem").textContent = text ?? "";
  $("problem").hidden = !text;
}

const pictures = new Pictures((sameList) => {
  if (!sameList) forgetWords();
  else if (looked) showWord(looked.shown);
  problem();
  if ($("boxes").checked) detect();
}, problem);

const model = () => models.find((each) => each.id === $("model").value);

// ---- questions and answers

function line(kind, text) {
  const found = document.createElement("p");
  found.className = kind;
  found.textContent = text;
  $("log").append(found);
  $("log").scrollTop = $("log").scrollHeight;
  return found;
}

async function answer(question) {
  if (!question.trim()) return;
  running?.abort();
  const mine = (running = new AbortController());
  problem();
  forgetWords();
  const chosen = model();
  const asked = pictures.list.length > 1 && chosen.images > 1 ? pictures.list : pictures.list.slice(pictures.current, pictures.current + 1);
  line("question", question);
  const said = line("answer running", "");
  $("send").hidden = true;
  $("stop").hidden = $("clear").hidden = false;
  const start = performance.now();
  let first = null;
  try {
    const pieces = ask(chosen.id, asked, question, mine.signal);
    let step = await pieces.next();
    for (; !step.done; step = await pieces.next()) {
      first ??= performance.now();
      said.textContent += step.value;
      $("log").scrollTop = $("log").scrollHeight;
    }
    if (!said.textContent) said.textContent = "(no answer)";
    showTimes(step.value.timings, (first ?? performance.now()) - start, performance.now() - start);
    for (const note of step.value.notes ?? []) line("note", note);
    if (asked.length) showWords(chosen.id, asked, question, said.textContent);
  } catch (error) {
    if (error.name === "AbortError") said.textContent += " (stopped)";
    else { said.remove(); problem(error.message); }
  } finally {
    said.classList.remove("running");
    if (running === mine) {
      running = null;
      $("send").hidden = false;
      $("stop").hidden = true;
    }
  }
}

function showTimes(times, firstMs, allMs) {
  const other = Math.max(0, firstMs - times.look_ms - times.prompt_ms);
  const rate = times.predicted_n > 1 ? ` · ${Math.round(times.predicted_per_second)} tokens/s` : "";
  const stages = [
    ["Network", other], [times.cached_pictures ? "Picture (known)" : "Picture", times.look_ms],
    ["Prompt", times.prompt_ms], [`Answer${rate}`, times.predicted_ms],
  ];
  [...$("bar").children].forEach((part, i) => { part.style.flexGrow = stages[i][1]; });
  $("stages").replaceChildren(...stages.map(([name, ms], i) => {
    const group = document.createElement("div"), title = document.createElement("dt"), value = document.createElement("dd");
    group.className = `s${i + 1}`;
    title.textContent = name;
    value.textContent = `${ms < 10 ? ms.toFixed(1) : Math.round(ms)} ms`;
    group.append(title, value);
    return group;
  }));
  $("latency").hidden = false;
  $("latency").dataset.firstMs = firstMs.toFixed(1);
  $("latency").dataset.allMs = allMs.toFixed(1);
}

// ---- where words looked

function forgetWords() {
  looked = null;
  pictures.heat = null;
  $("looked").hidden = true;
  pictures.draw();
}

async function showWords(name, asked, question, text) {
  let found;
  try {
    found = await postJson("/attention", { model: name, messages: messagesAbout(asked, question), answer: text });
  } catch {
    return; // a model without cells: there is nothing to show
  }
  if (!found.words.length || running) return;
  looked = { ...found, first: asked.length > 1 ? 0 : pictures.current, shown: -1 };
  $("words").replaceChildren(...found.words.map((word, i) => {
    const button = document.createElement("button");
    button.textContent = word.text;
    button.setAttribute("aria-pressed", "false");
    button.onclick = () => showWord(looked.shown === i ? -1 : i);
    return button;
  }));
  $("looked").hidden = false;
  showWord(firstToShow(found.words));
}

// The first word that is no short one: of "a man in a white shirt" it is "man"
function firstToShow(words) {
  return Math.max(0, words.findIndex((word) => /\w{3}/.test(word.text) && !/^(the|and|with|there|this)$/i.test(word.text)));
}

function showWord(index) {
  looked.shown = index;
  [...$("words").children].forEach((button, i) => button.setAttribute("aria-pressed", String(i === index)));
  const word = looked.words[index];
  pictures.heat = null;
  if (word) {
    const all = word.pictures.flat(), least = Math.min(...all), most = Math.max(...all, least + 1e-9);
    const cells = [], boxes = [];
    word.pictures.forEach((weights, i) => {
      cells[looked.first + i] = weights.map((weight) => (weight - least) / (most - least));
      boxes[looked.first + i] = looked.boxes[i];
    });
    if (cells[pictures.current]) pictures.heat = { side: looked.side, cells, boxes };
  }
  pictures.draw();
}

// ---- objects

async function detect() {
  const picture = pictures.shown;
  pictures.objects = null;
  if ($("boxes").checked && picture)
    try {
      const found = await postJson("/detect", { image: picture.url });
      if (picture === pictures.shown) pictures.objects = found.objects;
    } catch (error) {
      problem(error.message);
      $("boxes").checked = false;
    }
  pictures.draw();
}

// ---- tabs and keys

const tabs = [...document.querySelectorAll("[role=tab]")];

function choose(tab) {
  for (const each of tabs) {
    const here = each === tab;
    each.setAttribute("aria-selected", String(here));
    each.tabIndex = here ? 0 : -1;
    $(each.getAttribute("aria-controls")).hidden = !here;
  }
  $("picture").hidden = tab.id === "tab-robot";
}

for (const tab of tabs) tab.onclick = () => choose(tab);
document.querySelector("[role=tablist]").addEventListener("keydown", (event) => {
  const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  const there = tabs.filter((tab) => !tab.hidden);
  if (!step) return;
  const next = there[(there.indexOf(document.activeElement) + step + there.length) % there.length];
  choose(next);
  next.focus();
});
$("words").addEventListener("keydown", (event) => {
  const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key], buttons = [...$("words").children];
  if (!step) return;
  const next = (buttons.indexOf(document.activeElement) + step + buttons.length) % buttons.length;
  buttons[next].focus();
  showWord(next);
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
  if (event.key === "/" && !/INPUT|SELECT|TEXTAREA/.test(document.activeElement.tagName)) {
    event.preventDefault();
    $("question").focus();
  }
});
$("form").onsubmit = (event) => {
  event.preventDefault();
  const question = $("question").value;
  $("question").value = "";
  answer(question);
};
$("describe").onclick = () => answer(model().caption_prompt);
$("stop").onclick = () => running?.abort();
$("clear").onclick = () => { $("log").replaceChildren(); $("clear").hidden = $("latency").hidden = true; forgetWords(); };
$("strength").oninput = () => pictures.draw();
$("boxes").onchange = detect;
$("model").onchange = () => { $("describe").hidden = !model().caption_prompt; forgetWords(); };

// ---- start

async function start() {
  try {
    models = (await getJson("/v1/models")).data;
    const server = await getJson("/page-settings");
    const answering = models.filter((each) => each.learnt.questions || each.learnt.captions);
    $("model").replaceChildren(...answering.map((each) => new Option(each.id)));
    if (answering.length) $("model").onchange();
    $("boxes-label").hidden = !server.detects;
    compareTab(answering, pictures, problem);
    $("tab-compare").hidden = answering.length < 2;
    $("tab-robot").hidden = !server.simulates;
    if (server.simulates) robotTab(problem);
    if (!answering.length && server.simulates) choose($("tab-robot"));
    document.body.dataset.ready = "yes";
  } catch (error) {
    problem(`The server cannot be reached: ${error.message}`);
  }
}
start();
