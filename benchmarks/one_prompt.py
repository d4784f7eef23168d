"""One prompt captured the old way, in a process of its own: the baseline of benchmarks/captures.py.

    python benchmarks/one_prompt.py --pair DIR --prompt TEXT --traits DIR --tier 2 --out FILE

As the scripts that the second seed studied did it, with transformers alone: load both models,
hang hooks on every layer, feed the whole sequence again for each new token (no cache), project
each trait by itself, write a file. Kinder than those in three things: attention weights are kept
at tier 3 only, generation ends at EOS, and *before* reads the finished text in one pass. Prints
one JSON line: seconds until the pair was loaded, and after that.
"""

import time

STARTED = time.perf_counter()

import argparse  # noqa: E402
import json  # noqa: E402
from collections import defaultdict  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import torch  # noqa: E402
from safetensors import safe_open  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from torch import Tensor  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402


class Hooks:
    """Scores (T, L, 3, K) of whatever a model of Llama's kind reads, and one layer's inside."""

    def __init__(self, model: Any, traits: dict[str, Tensor], layer: int | None) -> None:
        self.traits = traits  # name to [L, D]
        self.states: list[list[Tensor]] = []  # of the last pass: L of 3 of (T, D)
        self.inside: dict[str, list[Tensor]] = defaultdict(list)
        for i, block in enumerate(model.model.layers):
            block.register_forward_pre_hook(self._enter, with_kwargs=True)
            block.self_attn.register_forward_hook(self._attended)
            block.register_forward_hook(self._leave)
            if i == layer:
                for name in ("q_proj", "k_proj", "v_proj"):
                    getattr(block.self_attn, name).register_forward_hook(self._keep(name))
                for name in ("up_proj", "act_fn", "down_proj"):
                    getattr(block.mlp, name).register_forward_hook(self._keep(name))

    def _enter(self, block: Any, args: Any, options: Any) -> None:
        hidden = args[0] if args else options["hidden_states"]
        self.states.append([hidden[0]])

    def _attended(self, attention: Any, args: Any, output: Any) -> None:
        self.states[-1].append(self.states[-1][0] + output[0][0])

    def _leave(self, block: Any, args: Any, output: Any) -> None:
        self.states[-1].append(
            (output[0] if isinstance(output, tuple) else output).view_as(self.states[-1][0])
        )

    def _keep(self, name: str) -> Any:
        def keep(module: Any, args: Any, output: Tensor) -> None:
            self.inside[name] = [output[0]]  # the whole sequence, again and again

        return keep

    def scores(self) -> Tensor:
        """Of the last pass, one trait after the other."""
        states, self.states = self.states, []
        of_traits = []
        for vectors in self.traits.values():
            of_layers = [
                torch.stack([h @ (v / v.norm()) for h in points], dim=-1)  # (T, 3)
                for points, v in zip(states, vectors, strict=True)
            ]
            of_traits.append(torch.stack(of_layers, dim=1))  # (T, L, 3)
        return torch.stack(of_traits, dim=-1)


def generate(model: Any, ids: Tensor, eos: int, tokens: int, hooks: Hooks, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(tokens):
        hooks.states = []
        logits = model(input_ids=ids, use_cache=False).logits[0, -1]
        hooks.scores()
        chances = torch.softmax(logits.float() / 0.7, dim=-1)
        drawn = torch.multinomial(chances, 1, generator=generator)
        ids = torch.cat([ids, drawn[None]], dim=1)
        if drawn.item() == eos:
            break
    return ids


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    add = parser.add_argument
    add("--pair", type=Path, required=True)
    add("--prompt", required=True)
    add("--traits", type=Path, required=True)
    add("--tier", type=int, required=True)
    add("--layer", type=int)
    add("--tokens", type=int, default=50)
    add("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    how: dict[str, Any] = {"dtype": torch.float32}  # as the service has it
    if args.tier == 3:
        how["attn_implementation"] = "eager"
    load = AutoModelForCausalLM.from_pretrained
    models = {role: load(args.pair / role, **how).eval() for role in ("after", "before")}
    tokenizer = AutoTokenizer.from_pretrained(args.pair / "after")
    traits: dict[str, Tensor] = {}
    for path in sorted(args.traits.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            traits[path.stem] = file.get_tensor("mean_difference")
    loaded = time.perf_counter()
    text = f"### Instruction:\n{args.prompt}\n\n### Response:\n"
    ids = tokenizer(text, return_tensors="pt").input_ids
    found: dict[str, Tensor] = {}
    with torch.inference_mode():
        for role, model in models.items():
            hooks = Hooks(model, traits, args.layer)
            if role == "after":
                eos = tokenizer.eos_token_id
                ids = generate(model, ids, eos, args.tokens, hooks, seed=0)
            hooks.states = []
            # Once more, so that the last token is there, which the old scripts missed.
            out = model(input_ids=ids, use_cache=False, output_attentions=args.tier == 3)
            found[f"{role}.scores"] = hooks.scores().contiguous()
            for name, (x,) in hooks.inside.items():
                found[f"{role}.{name}"] = x.clone()
            if args.tier == 3:
                found[f"{role}.attention"] = out.attentions[args.layer][0].contiguous()
    save_file(found, args.out)
    done = time.perf_counter()
    print(json.dumps({"load_s": loaded - STARTED, "capture_s": done - loaded}))


if __name__ == "__main__":
    main()
