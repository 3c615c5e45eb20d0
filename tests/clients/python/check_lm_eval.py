"""`lm-eval`: local-completions with each tokenizer backend, and local-chat-completions."""

import json
import tempfile
from functools import cache
from pathlib import Path

import lm_eval
from lm_eval.tasks import TaskManager
from system import SYSTEM

PACKAGE = "lm-eval"
FOLDER = Path(tempfile.mkdtemp())
DOCUMENTS = FOLDER / "documents.jsonl"
COMMON = {
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": str(DOCUMENTS)}},
    "test_split": "test",
    "doc_to_text": "{{context}}",
}
TASKS = {
    "continuations": {
        "output_type": "loglikelihood",
        "doc_to_target": "{{continuation}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
    },
    "generation": {
        "output_type": "generate_until",
        "doc_to_target": "{{continuation}}",
        "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 8, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
    "texts": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{context}}{{continuation}}",
        "metric_list": [{"metric": "word_perplexity"}],
    },
}
BACKENDS = {
    "huggingface": {"tokenizer_backend": "huggingface", "tokenizer": SYSTEM.checkpoint},
    "remote": {"tokenizer_backend": "remote"},
    "auto": {"tokenizer_backend": "auto"},
}

lines = [json.dumps(vars(document)) for document in SYSTEM.documents]
DOCUMENTS.write_text("\n".join(lines) + "\n", encoding="utf-8")
for name, task in TASKS.items():  # JSON is valid YAML
    text = json.dumps({"task": name, **COMMON, **task})
    (FOLDER / f"{name}.yaml").write_text(text, encoding="utf-8")


def evaluate(task: str, model: str = "local-completions", chat: bool = False, **arguments) -> list:
    """Return the responses of a model of the running system."""
    path = "chat/completions" if model == "local-chat-completions" else "completions"
    served = {"model": SYSTEM.model, "base_url": f"{SYSTEM.url}/{path}"}
    served |= {"max_length": SYSTEM.context, "max_retries": 1}
    return responses(task, model, {**served, **arguments}, chat=chat)


def responses(task: str, model: str, arguments: dict, chat: bool = False) -> list:
    """Return lm-eval's filtered responses for each document, in order."""
    results = lm_eval.simple_evaluate(
        model=model,
        model_args=arguments,
        tasks=[task],
        task_manager=TaskManager(include_path=str(FOLDER), include_defaults=False),
        apply_chat_template=chat,
        bootstrap_iters=0,
        log_samples=True,
    )
    samples = sorted(results["samples"][task], key=lambda sample: sample["doc_id"])
    return [sample["filtered_resps"] for sample in samples]


def assert_log_likelihoods(found: list) -> None:
    """Log-likelihoods of the continuations equal the model's in process, within 1e-4."""
    for document, [(value, _)] in zip(SYSTEM.documents, found, strict=True):
        assert abs(document.log_likelihood - value) < 1e-4, (document, value)


def check_huggingface():
    """Backend huggingface: log-likelihoods equal the model's in process"""
    assert_log_likelihoods(evaluate("continuations", **BACKENDS["huggingface"]))


def check_remote():
    """Backend remote: log-likelihoods equal the model's, with the gateway's tokenizer routes"""
    assert_log_likelihoods(evaluate("continuations", **BACKENDS["remote"]))


def check_auto():
    """Backend auto finds /tokenizer_info"""
    assert_log_likelihoods(evaluate("continuations", **BACKENDS["auto"]))


def check_text_requests():
    """Prompts as text give the same log-likelihoods with the backends huggingface and remote"""
    for backend in ("huggingface", "remote"):
        found = evaluate("continuations", **BACKENDS[backend], tokenized_requests=False)
        assert_log_likelihoods(found)


def check_batches():
    """Four prompts per request, and four concurrent requests, give the same log-likelihoods"""
    assert_log_likelihoods(evaluate("continuations", **BACKENDS["remote"], batch_size=4))
    assert_log_likelihoods(evaluate("continuations", **BACKENDS["remote"], num_concurrent=4))


def check_rolling():
    """loglikelihood_rolling returns the values of the model in process"""
    for backend in ("huggingface", "remote"):
        found = evaluate("texts", **BACKENDS[backend])
        for document, [value] in zip(SYSTEM.documents, found, strict=True):
            assert abs(document.rolling - value) < 1e-4, (document, value)


@cache
def generations() -> list:
    return evaluate("generation", **BACKENDS["remote"])


def check_generation():
    """generate_until returns the same with each backend and without one"""
    found = generations()
    assert any(text for [text] in found)
    assert found == evaluate("generation", **BACKENDS["huggingface"])
    assert found == evaluate("generation", tokenizer_backend=None)


def check_chat_generation():
    """local-chat-completions works with a chat template"""
    found = evaluate("generation", "local-chat-completions", chat=True)
    assert any(text for [text] in found)


def check_chat_template():
    """local-completions works with a chat template that the backend huggingface renders"""
    found = evaluate("generation", chat=True, **BACKENDS["huggingface"])
    assert any(text for [text] in found)
