"""vLLM as a peer, in an environment of its own: JSON lines in, JSON lines out.

    VLLM_ENV/bin/python vllm_worker.py MODEL_DIRECTORY MAX_MODEL_LEN eager|compiled

The first line out says that the model is loaded. Then {"prompts": [[id, ...], ...], "tokens": m}
continues all prompts greedily by m tokens each, at once, and answers with the seconds it took and
the token ids. Imports nothing of ponderttt.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any, TextIO


def main(directory: str, max_model_len: int, eager: bool, answers: TextIO) -> None:
    """Answer requests until standard input ends."""
    import torch
    import vllm

    model = vllm.LLM(
        model=directory,
        dtype="float32",
        enforce_eager=eager,
        max_model_len=max_model_len,
    )
    facts = {"version": vllm.__version__, "threads": torch.get_num_threads(), "eager": eager}
    _answer(answers, facts)
    for line in sys.stdin:
        request = json.loads(line)
        params = vllm.SamplingParams(
            max_tokens=request["tokens"], temperature=0.0, ignore_eos=True, detokenize=True
        )
        prompts: Any = [{"prompt_token_ids": ids} for ids in request["prompts"]]
        begun = time.perf_counter()
        outputs = model.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - begun
        tokens = [list(output.outputs[0].token_ids) for output in outputs]
        _answer(answers, {"seconds": seconds, "tokens": tokens})


def _answer(answers: TextIO, value: dict[str, Any]) -> None:
    answers.write(json.dumps(value) + "\n")
    answers.flush()


if __name__ == "__main__":
    # vLLM logs to standard output, which is for answers here.
    kept = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3] == "eager", kept)
