"""A process that holds one peer: reads one JSON object a line, answers with one. `python -m bench.peers.worker NAME`.

First line: the fields of `Setup`. Answer: `{"description"}`, `{"missing"}` where its library is not installed, or
`{"error"}`. Then `{"prompts", "new_tokens"}`, answered with the fields of `Timing`, until standard input ends.
"""

import dataclasses
import importlib
import json
import os
import sys
import traceback
from typing import Any, TextIO

from bench.peers.protocol import Peer, Setup

MODULES = {"atoma": "atoma", "llama_cpp": "llamacpp", "transformers": "pytorch", "openvino": "genai"}


def serve(name: str, requests: TextIO, answers: TextIO) -> None:
    """Runs the peer until the requests end."""

    def answer(value: dict[str, Any]) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    setup = Setup(**json.loads(requests.readline()))
    try:
        module = importlib.import_module(f"bench.peers.{MODULES[name]}")
    except ImportError as error:
        answer({"missing": str(error)})
        return
    try:
        peer: Peer = module.load(setup)
        answer({"description": peer.description})
        for line in requests:
            request = json.loads(line)
            answer(dataclasses.asdict(peer.run(request["prompts"], request["new_tokens"])))
    except Exception as error:
        traceback.print_exc()
        answer({"error": f"{type(error).__name__}: {error}"})


def main() -> None:
    """Keeps standard output for the answers: whatever a library prints goes to standard error."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    serve(sys.argv[1], sys.stdin, answers)


if __name__ == "__main__":
    main()
