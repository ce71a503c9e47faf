// The pictures that are shown to the model, and what is drawn over them: attention, objects.

const LONGEST = 1024; // pixels of a side that are sent: more than any encoder here reads
const $ = (id) => document.getElementById(id);

export class Pictures {
  // changed: called when another picture is shown or the list changes
  constructor(changed, problem) {
    this.list = [];
    this.current = 0;
    this.changed = changed;
    this.problem = problem;
    this.heat = null; // {side, boxes, cells: per picture, values in 0..1}
    this.objects = null; // of the current picture
    this.stream = null;
    this.listen();
  }

  get shown() {
    return this.list[this.current];
  }

  listen() {
    const drop = $("drop");
    $("choose").onclick = () => $("file").click();
    $("file").onchange = () => { this.add([...$("file").files]); $("file").value = ""; };
    $("remove").onclick = () => this.remove();
    $("camera").onclick = () => (this.stream ? this.endCamera() : this.startCamera());
    $("shoot").onclick = () => this.shoot();
    for (const kind of ["dragover", "dragleave", "drop"])
      drop.addEventListener(kind, (event) => {
        event.preventDefault();
        drop.classList.toggle("over", kind === "dragover");
        if (kind === "drop") this.add([...event.dataTransfer.files]);
      });
    // a picture that is dropped beside the stage must not replace the page
    for (const kind of ["dragover", "drop"]) document.addEventListener(kind, (event) => event.preventDefault());
    document.addEventListener("paste", (event) => {
      const files = [...event.clipboardData.files].filter((file) => file.type.startsWith("image/"));
      if (files.length) this.add(files);
    });
  }

  async add(files) {
    const broken = [];
    for (const file of files) {
      try {
        this.list.push(await readPicture(file));
        this.current = this.list.length - 1;
      } catch {
        broken.push(file.name || "this");
      }
    }
    this.show();
    if (broken.length) this.problem(`${broken.join(", ")}: no picture that this browser can open`);
  }

  remove() {
    this.list.splice(this.current, 1);
    this.current = Math.max(0, this.current - 1);
    this.show();
  }

  show() {
    this.heat = this.objects = null;
    this.list_thumbs();
    const there = this.list.length > 0;
    $("stage").hidden = !there;
    $("empty").hidden = there || this.stream !== null;
    $("remove").hidden = !there;
    this.draw();
    this.changed();
  }

  list_thumbs() {
    $("thumbs").hidden = this.list.length < 2;
    $("thumbs").replaceChildren(...this.list.map((picture, i) => {
      const button = document.createElement("button"), image = document.createElement("img"), item = document.createElement("li");
      image.src = picture.url;
      image.alt = "";
      button.setAttribute("aria-label", `Picture ${i + 1}: ${picture.name}`);
      button.setAttribute("aria-pressed", i === this.current);
      button.onclick = () => { this.current = i; this.objects = null; this.list_thumbs(); this.draw(); this.changed(true); };
      button.append(image);
      item.append(button);
      return item;
    }));
  }

  draw() {
    const picture = this.shown, canvas = $("stage");
    if (!picture) return canvas.setAttribute("aria-label", "No picture yet");
    canvas.width = picture.bitmap.width;
    canvas.height = picture.bitmap.height;
    canvas.setAttribute("aria-label", `Picture ${this.current + 1} of ${this.list.length}: ${picture.name}`);
    const pen = canvas.getContext("2d");
    pen.drawImage(picture.bitmap, 0, 0);
    if (this.heat) this.drawHeat(pen, canvas);
    if (this.objects) this.drawObjects(pen, canvas);
  }

  // The picture is as bright as the attention is there (a colour on top would hide what it shows); a line is around the cells
  // that have at least half of the most
  drawHeat(pen, canvas) {
    const { side, boxes, cells } = this.heat, strength = $("strength").value / 100, values = cells[this.current];
    const small = new OffscreenCanvas(side, side), dark = new ImageData(side, side);
    values.forEach((value, i) => { dark.data[4 * i + 3] = 255 * strength * (1 - value); });
    small.getContext("2d").putImageData(dark, 0, 0);
    const [left, top, right, bottom] = boxes[this.current].map((edge) => edge * side);
    pen.imageSmoothingEnabled = true;
    pen.imageSmoothingQuality = "high";
    pen.drawImage(small, left, top, right - left, bottom - top, 0, 0, canvas.width, canvas.height);
    if (strength === 0) return;
    const x = (column) => (column - left) / (right - left) * canvas.width;
    const y = (row) => (row - top) / (bottom - top) * canvas.height;
    const line = Math.max(2, canvas.width / 250), outline = outlineOf(values, side);
    for (const [width, colour] of [[2 * line, "black"], [line, "#ffd84d"]]) {
      pen.lineWidth = width;
      pen.strokeStyle = colour;
      pen.lineCap = "square";
      pen.beginPath();
      for (const [x1, y1, x2, y2] of outline) { pen.moveTo(x(x1), y(y1)); pen.lineTo(x(x2), y(y2)); }
      pen.stroke();
    }
  }

  drawObjects(pen, canvas) {
    const line = Math.max(2, canvas.width / 250), size = Math.max(12, canvas.width / 38);
    pen.font = `600 ${size}px system-ui, sans-serif`;
    for (const found of this.objects) {
      const [x1, y1, x2, y2] = found.box, label = `${found.class_name} ${found.score.toFixed(2)}`;
      pen.lineWidth = line;
      pen.strokeStyle = pen.fillStyle = `hsl(${(found.class_id * 137.5 + 170) % 360} 70% 38%)`;
      pen.strokeRect(x1, y1, x2 - x1, y2 - y1);
      const above = y1 > size * 1.4 ? y1 - size * 1.4 : y1;
      pen.fillRect(x1 - line / 2, above, pen.measureText(label).width + size * 0.6, size * 1.4);
      pen.fillStyle = "white";
      pen.fillText(label, x1 + size * 0.3, above + size);
    }
  }

  async startCamera() {
    if (!navigator.mediaDevices)
      return this.problem("The browser gives its camera to https pages and to this machine only: start the server with --ssl-certfile");
    try {
      this.stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
    } catch (error) {
      return this.problem(`The camera cannot be used: ${error.message}`);
    }
    $("video").srcObject = this.stream;
    await $("video").play();
    $("stage").hidden = $("empty").hidden = true;
    $("video").hidden = $("shoot").hidden = false;
    $("camera").textContent = "Close camera";
    $("shoot").focus();
  }

  endCamera() {
    this.stream.getTracks().forEach((track) => track.stop());
    this.stream = null;
    $("video").hidden = $("shoot").hidden = true;
    $("camera").textContent = "Camera";
    this.show();
  }

  async shoot() {
    const canvas = new OffscreenCanvas($("video").videoWidth, $("video").videoHeight);
    canvas.getContext("2d").drawImage($("video"), 0, 0);
    const blob = await canvas.convertToBlob({ type: "image/jpeg", quality: 0.92 });
    const picture = await readPicture(new File([blob], "camera"));
    this.list.push(picture);
    this.current = this.list.length - 1;
    this.endCamera();
  }
}

// [x1, y1, x2, y2] in cells: the sides between a cell of at least 0.5 and a neighbour with less
function outlineOf(values, side) {
  const lines = [], high = (x, y) => x >= 0 && y >= 0 && x < side && y < side && values[y * side + x] >= 0.5;
  for (let y = 0; y <= side; y++)
    for (let x = 0; x <= side; x++) {
      if (high(x, y) !== high(x - 1, y)) lines.push([x, y, x, y + 1]);
      if (high(x, y) !== high(x, y - 1)) lines.push([x, y, x + 1, y]);
    }
  return lines;
}

// {name, url: data URI, bitmap}: upright, and no larger than the server needs
async function readPicture(file) {
  const whole = await createImageBitmap(file, { imageOrientation: "from-image" });
  const scale = Math.min(1, LONGEST / Math.max(whole.width, whole.height));
  const canvas = new OffscreenCanvas(Math.max(1, Math.round(whole.width * scale)), Math.max(1, Math.round(whole.height * scale)));
  const pen = canvas.getContext("2d");
  pen.fillStyle = "white"; // behind transparent pixels, as the server does
  pen.fillRect(0, 0, canvas.width, canvas.height);
  pen.imageSmoothingQuality = "high";
  pen.drawImage(whole, 0, 0, canvas.width, canvas.height);
  const small = scale === 1 && file.size < 2e6;
  const kept = small && file.type === "image/png"; // as it is: drawings must not get JPEG's traces
  const blob = kept ? file : await canvas.convertToBlob({ type: "image/jpeg", quality: 0.92 });
  return { name: file.name || "pasted", url: await dataUri(blob), bitmap: await createImageBitmap(canvas) };
}

function dataUri(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(blob);
  });
}
