"""Tests of the plug-in for vLLM, in an environment of its own: `make vllm-test`."""
