"""The plug-in for vLLM without vLLM: options, versions, and config.json."""

import pickle
from pathlib import Path
from typing import Any, get_args

import pytest
from tolhouse.errors import InvalidArgumentError, UnsupportedError
from tolhouse.integrations.vllm.config import FFN_C, HEAD_SIZES, MemoryLLMConfig, padded_head_dim
from tolhouse.integrations.vllm.options import AdditionalConfig, parse
from tolhouse.integrations.vllm.versions import SUPPORTED, check_version
from tolhouse.model.config import PRESETS, FfnC, ModelConfig, RopeScaling, preset


def test_options_come_from_the_config_then_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Options are those of --additional-config, then of variables, then defaults."""
    monkeypatch.setenv("TOLHOUSE_VLLM_ROWS", "file:///a")
    monkeypatch.setenv("TOLHOUSE_VLLM_TABLE", "t@1")
    options = parse({"tolhouse": {"rows": "127.0.0.1:9", "row_cache_megabytes": 1}, "other": 2})
    assert ("127.0.0.1:9", "t@1", 1.0) == (options.rows, options.table, options.row_cache_megabytes)
    assert "auto" == options.fallback
    assert "file:///a" == parse({}).rows


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], r"must be a JSON object, not \[\]"),
        ({"row": "file:///a"}, "\"row\": …}} is unknown; did you mean 'rows'"),
        ({"zz": 1}, '"zz": …}} is unknown; allowed are .*rows, table, row_memory, row_cache_'),
        ({"rows": 1}, '"rows": …}} must be a string, not 1'),
        ({"insecure": "yes"}, '"insecure": …}} must be true or false'),
        ({"row_cache_megabytes": "32"}, "must be a number, not '32'"),
        ({"row_cache_megabytes": True}, "must be a number, not True"),
        ({"row_cache_megabytes": -1}, r"TOLHOUSE_VLLM_ROW_CACHE_MEGABYTES\): .* greater than"),
        ({"fetch_timeout_seconds": 0}, "TOLHOUSE_VLLM_FETCH_TIMEOUT_SECONDS"),
        ({"row_memory": "gpu"}, "should be 'cache', 'host' or 'device'; 'gpu' was given"),
    ],
)
def test_a_bad_option_is_named_with_what_is_allowed(given: Any, message: str) -> None:
    """An unknown option, a wrong type and a value out of bounds are each refused by name."""
    with pytest.raises(InvalidArgumentError, match=message):
        parse({"tolhouse": given})


def test_compiled_code_depends_on_blocks_only() -> None:
    """Another version or address leaves the hash for compiled code, and other blocks change it."""
    one, two = parse({}), parse({"tolhouse": {"rows": "127.0.0.1:9"}})
    first = AdditionalConfig(one, "t@1", ("ffn.0",), {"a": 1})
    assert first.compute_hash() == AdditionalConfig(two, "t@2", ("ffn.0",), {"a": 1}).compute_hash()
    for blocks, others in ((("x0", "ffn.0"), {"a": 1}), (("ffn.0",), {"a": 2})):
        other = AdditionalConfig(one, "t@1", blocks, others)
        assert first.compute_hash() != other.compute_hash()
    assert (1, None) == (first.get("a"), first.get("b"))
    assert first == pickle.loads(pickle.dumps(first))


@pytest.mark.parametrize("version", ["", "0.31.9", "0.33.0", "1.0"])
def test_another_version_of_vllm_is_refused(version: str) -> None:
    """The error for a version names the supported ones."""
    with pytest.raises(UnsupportedError, match=rf"supports vLLM {SUPPORTED[0]}\.x"):
        check_version(version)


def test_patches_of_a_supported_version_are_allowed() -> None:
    """Patches and builds of a supported version are supported."""
    for version in (f"{SUPPORTED[0]}.0", f"{SUPPORTED[0]}.3", f"{SUPPORTED[0]}.1+cpu"):
        check_version(version)


@pytest.mark.parametrize(
    ("size", "padded"), [(24, 32), (32, 32), (48, 64), (60, 64), (100, 112), (256, 256)]
)
def test_heads_are_padded_to_sizes_of_kernels(size: int, padded: int) -> None:
    """The padded head size is the next one that kernels have."""
    assert padded == padded_head_dim(size)


def test_the_page_lists_what_padding_costs_each_preset() -> None:
    """The page about vLLM has the head size of each preset, and the growth of its KV cache."""
    rows = []
    for name in PRESETS:
        size = preset(name, "memory", 0).head_dim
        padded = padded_head_dim(size)
        rows.append(f"| `{name}` | {size} | {padded} | +{100 * (padded / size - 1):.0f} % |")
    page = (Path(__file__).parents[2] / "docs" / "vllm.md").read_text(encoding="utf-8")
    assert rows == [line for line in page.splitlines() if line in rows]


def test_a_head_that_is_too_large_is_refused() -> None:
    """The error names the largest head size."""
    with pytest.raises(InvalidArgumentError, match=f"largest is {HEAD_SIZES[-1]}"):
        padded_head_dim(258)


@pytest.fixture
def supported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "tolhouse.integrations.vllm.versions.version", lambda _: f"{SUPPORTED[0]}.0"
    )


def test_config_for_vllm_keeps_the_shape(supported: None, tmp_path: Path) -> None:
    """vLLM reads a padded head size and the context, and `shape` has every field of ours."""
    scaling = RopeScaling(rope_type="linear", factor=2.0)
    fields = {"num_key_value_heads": 2, "head_dim": 20, "qk_norm": True, "rope_scaling": scaling}
    shape = preset("tiny", "flex", 3, eos_token_id=(1, 2), **fields)
    config = MemoryLLMConfig(**shape.to_json())
    assert shape == config.shape == pickle.loads(pickle.dumps(config)).shape
    assert (32, 2, [1, 2]) == (config.head_dim, config.num_key_value_heads, config.eos_token_id)
    assert ["TolhouseForCausalLM"] == config.architectures
    # vLLM would multiply the context by the factor of a scaling
    assert "default" == config.rope_parameters["rope_type"]
    config.save_pretrained(tmp_path)
    assert shape == MemoryLLMConfig.from_pretrained(tmp_path).shape


@pytest.mark.parametrize("form", sorted({*get_args(FfnC)} - {*FFN_C}))
def test_config_for_vllm_refuses_other_forms_of_ffn_c(form: Any, supported: None) -> None:
    """FFN-C runs in vLLM's layers, and a form without one is refused. FFN-M is in the rows."""
    message = f"FFN-C {form} does not run in vLLM; allowed are linear and swiglu"
    with pytest.raises(UnsupportedError, match=message):
        MemoryLLMConfig(**preset("tiny", "flex", 3, ffn_c=form).to_json())
    assert MemoryLLMConfig(**preset("tiny", "flex", 3, ffn_m=form).to_json()).shape.ffn_m == form


def test_config_for_vllm_refuses_unknown_fields(supported: None) -> None:
    """A field that changes the computation is refused as everywhere."""
    with pytest.raises(InvalidArgumentError, match="hidden_act"):
        MemoryLLMConfig(**preset("tiny", "memory").to_json(), hidden_act="gelu")
    shape = preset("tiny", "memory", summary_tokens=2, summary_segment=16)
    with pytest.raises(UnsupportedError, match="2 summary tokens"):
        MemoryLLMConfig(**shape.to_json())
    assert isinstance(MemoryLLMConfig(), MemoryLLMConfig)
    assert ModelConfig.from_json(preset("tiny", "memory").to_json()).kind == "memory"
