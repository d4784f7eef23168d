// One sample while it comes: its tokens' numbers, and its text cut at its tokens.

const COLUMNS = ["after", "before", "amplified"];

/** A part of the text: what tokens `first` to `last` added, with their numbers summed. */
function word(text, first, last, { ids, numbers }, eos = false) {
  const made = { text, first, last, ids: ids.slice(first, last + 1), eos };
  for (const name of [...COLUMNS, "kl"]) {
    const some = numbers[name].slice(first, last + 1);
    made[name] = some.length ? some.reduce((a, b) => a + b, 0) : undefined;
  }
  return made;
}

export class Sample {
  constructor(alpha, index) {
    Object.assign(this, { alpha, index, ids: [], text: "", words: [], completion: null });
    this.numbers = { after: [], before: [], amplified: [], kl: [] };
    this.shown = 0; // tokens whose text is out
  }

  /** Takes a piece; returns the words it added, or null where all words are others now. */
  add(piece) {
    this.ids.push(...piece.token_ids);
    for (const name of COLUMNS) this.numbers[name].push(...(piece.logprobs?.[name] ?? []));
    this.numbers.kl.push(...(piece.kl ?? []));
    this.text += piece.text;
    if (piece.completion) {
      this.completion = piece.completion;
      this.text = piece.completion.text;
      this.answer = answer(piece.completion);
      this.words = this.cut() ?? this.words;
      return null;
    }
    if (!piece.text) return []; // half a character, or what may become a stop: said with the next
    const added = word(piece.text, this.shown, this.ids.length - 1, this);
    this.shown = this.ids.length;
    this.words.push(added);
    return [added];
  }

  /** The completion's words by where its tokens end, in characters as Python counts them. */
  cut() {
    const { token_ends: ends, eos_index: eos, token_ids: ids } = this.completion;
    const characters = Array.from(this.text);
    if (!ends || ends.length !== ids.length || (ends.at(-1) ?? 0) !== characters.length) return null;
    this.ids = ids;
    const words = [];
    let start = 0, first = 0;
    ends.forEach((end, i) => {
      if (i !== eos && end <= start) return;
      words.push(word(characters.slice(start, end).join(""), first, i, this, i === eos));
      start = end;
      first = i + 1;
    });
    return words;
  }

  /** Whether it is an answer, of which one can say that a phrase is in it or not. */
  get counts() {
    return this.completion !== null && this.completion.finish_reason !== "error";
  }

}

/** The finished text without what follows the EOS. */
function answer({ text, eos_text_offset: end }) {
  return end === null ? text : Array.from(text).slice(0, end).join("");
}

/** The first place where two rows of token ids differ; null as long as one is the other's start. */
export function parting(some, others) {
  const both = Math.min(some.length, others.length);
  for (let i = 0; i < both; i += 1) if (some[i] !== others[i]) return i;
  return null;
}
