// Server-sent events of a POST, which EventSource cannot make.

/** What the server refused, or what ended its answer; `param` names the request's field. */
export class ServerError extends Error {
  constructor({ message, param }) {
    super(message);
    this.param = param;
  }
}

/** The objects that `POST url` streams, until `[DONE]`. Raises ServerError. */
export async function* stream(url, body, signal) {
  const answer = await fetch(url, {
    method: "POST",
    headers: { "content-type": "application/json", accept: "text/event-stream" },
    body: JSON.stringify(body),
    signal,
  });
  if (!answer.ok) throw new ServerError(await refusal(answer));
  for await (const { name, data } of events(answer.body)) {
    if (data === "[DONE]") return;
    const said = JSON.parse(data);
    if (name === "error") throw new ServerError(said.error);
    yield said;
  }
  throw new ServerError({ message: "the answer broke off" });
}

async function refusal(answer) {
  try {
    return (await answer.json()).error;
  } catch {
    return { message: `the server answered ${answer.status}` };
  }
}

async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const blocks = (rest + value).split("\n\n");
      rest = blocks.pop();
      yield* blocks.map(parsed);
    }
  } finally {
    reader.cancel().catch(() => {}); // whoever stops listening must not leave it running
  }
}

function parsed(block) {
  const event = { name: "message", data: "" };
  for (const line of block.split("\n")) {
    if (line.startsWith("event: ")) event.name = line.slice(7);
    if (line.startsWith("data: ")) event.data += line.slice(6);
  }
  return event;
}
