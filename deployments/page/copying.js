// What is on the page as something to run elsewhere.

const here = (path) => new URL(path, location.href.split("#")[0]).href;
const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;

/** A value as Python writes it. */
function python(value) {
  if (value === true) return "True";
  if (value === false) return "False";
  if (value === null) return "None";
  if (Array.isArray(value)) return `[${value.map(python).join(", ")}]`;
  if (typeof value === "object") {
    const items = Object.entries(value).map(([key, of]) => `\n    ${JSON.stringify(key)}: ${python(of)},`);
    return `{${items.join("")}\n}`;
  }
  return JSON.stringify(value);
}

const curl = (body) => `curl -N ${quoted(here("stream"))} -H 'content-type: application/json' \\
  -d ${quoted(JSON.stringify(body))}`;

const requests = (body) => `import json
import requests

body = ${python(body)}
with requests.post(${python(here("stream"))}, json=body, stream=True) as answer:
    answer.raise_for_status()
    for line in answer.iter_lines():
        if line.startswith(b"data: {"):
            piece = json.loads(line[6:])
            if "error" in piece:
                raise RuntimeError(piece["error"]["message"])
            if done := piece["completion"]:
                print(piece["alpha"], piece["index"], repr(done["text"]))
`;

const handle = ({ alphas, ...request }) => `import ray
from ray import serve

ray.init("auto")
handle = serve.get_app_handle("lda")
request = ${python(request)}
asked = {alpha: handle.generate.remote({**request, "alpha": alpha}) for alpha in ${python(alphas)}}
for alpha, answer in asked.items():
    for completion in answer.result():
        print(alpha, completion.seed, repr(completion.text))
`;

function inspect(body) {
  const model = (of) => `openai-api/lda/${body.pair ?? "lda"}:${of}`;
  const plain = (role) => (body.pair ? model(role) : `openai-api/lda/${role}`);
  const options = [
    `--model ${quoted(model(`alpha=${body.alphas.at(-1)}`))}`,
    `--temperature ${body.temperature} --max-tokens ${body.max_new_tokens} --seed ${body.seed}`,
  ];
  if (body.system_prompt) options.push(`--system-message ${quoted(body.system_prompt)}`);
  return `# The prompts are the task's own. For \`before\` and \`after\`: ${plain("before")}, ${plain("after")}.
export LDA_BASE_URL=${here("v1")} LDA_API_KEY=unused
inspect eval TASK.py \\
  ${options.join(" \\\n  ")}
`;
}

export const KINDS = { curl, requests, handle, inspect };
