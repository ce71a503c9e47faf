// Requests to this server. The key, if it wants one, stays in this tab.

const keyDialog = () => document.getElementById("key-dialog");

async function send(path, body, signal) {
  const headers = body ? { "Content-Type": "application/json" } : {};
  const key = sessionStorage.getItem("key");
  if (key) headers.Authorization = `Bearer ${key}`;
  const answer = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal });
  if (answer.status === 401) {
    await newKey();
    return send(path, body, signal);
  }
  if (!answer.ok) {
    const found = await answer.json().catch(() => null);
    throw new Error(found?.error?.message ?? `the server answered with status ${answer.status}`);
  }
  return answer;
}

function newKey() {
  return new Promise((resolve) => {
    keyDialog().addEventListener("close", () => {
      sessionStorage.setItem("key", document.getElementById("key").value);
      resolve();
    }, { once: true });
    keyDialog().showModal();
  });
}

export const getJson = async (path) => (await send(path)).json();
export const postJson = async (path, body, signal) => (await send(path, body, signal)).json();

// The objects of a stream of server-sent events, as they come
export async function* postEvents(path, body, signal) {
  const answer = await send(path, body, signal);
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    text += value;
    const events = text.split("\n\n");
    text = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") continue;
      const found = JSON.parse(data);
      if (found.error) throw new Error(found.error.message);
      yield found;
    }
  }
}

// A question about pictures, as chat/completions and attention take it
export function messagesAbout(pictures, question) {
  const shown = pictures.map((picture) => ({ type: "image_url", image_url: { url: picture.url } }));
  return [{ role: "user", content: [...shown, { type: "text", text: question }] }];
}

// Yields the pieces of an answer; returns its timings and usage
export async function* ask(model, pictures, question, signal) {
  const body = { model, messages: messagesAbout(pictures, question), stream: true, stream_options: { include_usage: true } };
  let end = null;
  for await (const chunk of postEvents("/v1/chat/completions", body, signal)) {
    const piece = chunk.choices[0]?.delta?.content;
    if (piece) yield piece;
    if (chunk.usage) end = chunk;
  }
  return end;
}
