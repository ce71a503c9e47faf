// The second tab: the policy drives the simulated arm, live. The arrow is the chunk of actions that it has just made.

import { getJson, postEvents } from "./api.js";

const $ = (id) => document.getElementById(id);

export async function robotTab(problem) {
  const { tasks } = await getJson("/simulator");
  let running = null;
  $("task").replaceChildren(...tasks.map((task) => new Option(task.name)));
  $("task").onchange = () => { $("instruction").value = tasks[$("task").selectedIndex].instruction; };
  $("task").value = "door-open";
  $("task").onchange();
  $("halt").onclick = () => running?.abort();
  $("robot-form").onsubmit = async (event) => {
    event.preventDefault();
    problem();
    running = new AbortController();
    $("start").hidden = true;
    $("halt").hidden = false;
    $("sim-state").textContent = "The simulator starts…";
    try {
      const asked = { task: $("task").value, instruction: $("instruction").value || null, seed: Number($("seed").value) };
      for await (const frame of postEvents("/simulator", asked, running.signal)) await draw(frame);
    } catch (error) {
      if (error.name === "AbortError") $("sim-state").textContent += " Stopped.";
      else problem(error.message);
    } finally {
      $("start").hidden = false;
      $("halt").hidden = true;
    }
  };
}

async function draw(frame) {
  const canvas = $("sim"), pen = canvas.getContext("2d"), image = new Image();
  image.src = frame.image;
  await image.decode();
  pen.imageSmoothingQuality = "high";
  pen.drawImage(image, 0, 0, canvas.width, canvas.height);
  const path = frame.path.map(([x, y]) => [x * canvas.width, y * canvas.height]);
  if (path.length > 1) drawArrow(pen, path);
  const verdict = frame.success ? "Success." : frame.ended ? "No success." : "";
  const grip = frame.actions.length ? (frame.actions.at(-1)[3] > 0 ? " The gripper closes." : " The gripper opens.") : "";
  $("sim-state").textContent = `Step ${frame.step} of ${frame.of}. ${verdict}${grip}`;
  canvas.setAttribute("aria-label", `The simulated arm at step ${frame.step}`);
}

function drawArrow(pen, path) {
  const [x, y] = path.at(-1), [fromX, fromY] = path[0], angle = Math.atan2(y - fromY, x - fromX);
  for (const [colour, width] of [["#0008", 7], ["#ffb02e", 4]]) {
    pen.strokeStyle = pen.fillStyle = colour;
    pen.lineWidth = width;
    pen.lineCap = pen.lineJoin = "round";
    pen.beginPath();
    path.forEach(([px, py], i) => (i ? pen.lineTo(px, py) : pen.moveTo(px, py)));
    for (const side of [-2.6, 2.6]) {
      pen.moveTo(x, y);
      pen.lineTo(x + 12 * Math.cos(angle + side), y + 12 * Math.sin(angle + side));
    }
    pen.stroke();
  }
}
