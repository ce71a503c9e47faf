// The third tab: two models answer the same question about the same picture.

import { ask } from "./api.js";

const $ = (id) => document.getElementById(id);

export function compareTab(models, pictures, problem) {
  for (const [i, side] of ["left", "right"].entries()) {
    $(side).replaceChildren(...models.map((each) => new Option(each.id)));
    $(side).selectedIndex = Math.min(i, models.length - 1);
  }
  $("compare-form").onsubmit = (event) => {
    event.preventDefault();
    problem();
    const question = $("compare-question").value;
    if (question.trim()) for (const side of ["left", "right"]) answer(side, pictures, question);
  };
}

async function answer(side, pictures, question) {
  const said = $(`${side}-answer`), time = $(`${side}-time`), start = performance.now();
  said.textContent = time.textContent = "";
  try {
    const shown = pictures.shown ? [pictures.shown] : [];
    for await (const piece of ask($(side).value, shown, question)) said.textContent += piece;
    time.textContent = `${Math.round(performance.now() - start)} ms`;
  } catch (error) {
    time.textContent = error.message;
  }
}
