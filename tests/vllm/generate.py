"""Completes prompts with vLLM: reads a job as JSON from stdin, and writes token ids to a file."""

import json
import sys
from pathlib import Path

from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest


def main() -> None:
    job = json.load(sys.stdin)
    sampling = SamplingParams(temperature=0, max_tokens=job["max_tokens"], ignore_eos=True)
    llm = LLM(**job["llm"])
    prompts = [{"prompt_token_ids": prompt} for prompt in job["prompts"]]
    adapter = LoRARequest("adapter", 1, job["adapter"]) if job["adapter"] else None
    outputs = llm.generate(prompts, sampling, use_tqdm=False, lora_request=adapter)
    token_ids = [list(output.outputs[0].token_ids) for output in outputs]
    Path(sys.argv[1]).write_text(json.dumps(token_ids), encoding="utf-8")


if __name__ == "__main__":
    main()
