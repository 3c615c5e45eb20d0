"""`lm-eval`: its model `hf` with the classes of tolhouse.integrations.transformers, in process."""

import sys

from system import SYSTEM

# torch and Tolhouse are in the environment that started the checks.
sys.path += SYSTEM.packages

import tolhouse.integrations.transformers  # noqa: F401 - registers the classes
from check_lm_eval import PACKAGE, assert_log_likelihoods, responses  # noqa: F401

MODEL = {"pretrained": SYSTEM.checkpoint, "dtype": "float32", "device": "cpu"}


def check_log_likelihoods():
    """Log-likelihoods of batches equal the model's in process"""
    assert_log_likelihoods(responses("continuations", "hf", MODEL | {"batch_size": 4}))


def check_rolling():
    """loglikelihood_rolling returns the values of our own model"""
    for document, [value] in zip(SYSTEM.documents, responses("texts", "hf", MODEL), strict=True):
        assert abs(document.rolling - value) < 1e-4, (document, value)


def check_generation():
    """generate_until returns texts"""
    assert any(text for [text] in responses("generation", "hf", MODEL))
