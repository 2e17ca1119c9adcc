"""Finds texts on which every implementation of the ternary test model must agree closely: no rounding is on edge.

`python -m tests.models.settled_texts` (needs the extra `bench` for the text) writes `tests/data/ternary/settled.json`.
Run it again when the weights change. The texts are beginnings of verses of the book that training did not see.
"""

import json
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from bench.ternary.text import read_corpus
from tests.models.bitnet_reference import EDGE, BitNetReference

DATA = Path(__file__).parents[1] / "data" / "ternary"
WORDS = 24  # of a sentence that are tried
KEPT = 6  # texts


def main() -> None:
    reference = BitNetReference(DATA / "hf")
    tokenizer = Tokenizer.from_file(str(DATA / "hf" / "tokenizer.json"))
    found: list[dict[str, str | int | float]] = []
    for chapter in read_corpus().held_out:
        for sentence in chapter.split(". "):
            encoding = tokenizer.encode(" ".join(sentence.split()[:WORDS]))
            edge = reference.forward(np.array(encoding.ids)).edge
            # Whole tokens before the first edge; a text that is cut there must give the same tokens again.
            count = int((edge > EDGE).sum())
            text = tokenizer.decode(encoding.ids[:count], skip_special_tokens=True)
            if tokenizer.encode(text).ids == encoding.ids[:count]:
                found.append({"text": text, "tokens": count, "edge": float(edge[count - 1])})
    found.sort(key=lambda case: -int(case["tokens"]))
    (DATA / "settled.json").write_text(json.dumps(found[:KEPT], indent=2) + "\n", encoding="utf-8")
    print(json.dumps(found[:KEPT], indent=2))


if __name__ == "__main__":
    main()
