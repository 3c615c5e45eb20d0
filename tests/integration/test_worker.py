"""The worker's gRPC service as a process, also with failing lookup services."""

import json
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path

import grpc
import numpy as np
import pytest
from redis import Redis
from tolhouse import Client, errors
from tolhouse.client.row_source import StoreRowSource, open_row_source
from tolhouse.engine.kv_policy import Score, Summary, Window
from tolhouse.engine.row_providers import CachedRows
from tolhouse.engine.table import wait_for_table
from tolhouse.model.checkpoint import open_checkpoint
from tolhouse.model.generate import greedy
from tolhouse.store.base import open_store
from tolhouse.testing import (
    Cluster,
    Process,
    build_table,
    end,
    free_port,
    local_cluster,
    process,
    redis_node,
    redis_server,
    tiny_model,
    wait_until,
)
from tolhouse.v1 import generation_pb2
from tolhouse.v1.generation_pb2_grpc import GenerationStub

from tests.commands import LOCAL, metrics, send_signal, start, tolhouse
from tests.engines import CPU, Request, engine_of, serve

UNCACHED = ("--row-cache-megabytes", "0")
PROMPT = [5, 17, 3, 99, 200]


# the service


@pytest.fixture(scope="module")
def table(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    url = f"file://{tmp_path_factory.mktemp('tables')}"
    return url, build_table(checkpoint, url, shards=4)


@pytest.fixture(scope="module")
def cluster(checkpoint: Path, table: tuple[str, str]) -> Iterator[Cluster]:
    with local_cluster(
        checkpoint, table[0], worker_options=("--max-waiting", "6", "--max-num-seqs", "4")
    ) as running:
        yield running


@pytest.fixture
def worker(cluster: Cluster) -> Iterator[Client]:
    with Client(cluster.workers) as client:
        yield client


def settle(worker: Client, **expected: int) -> None:
    """Wait until the worker reports these values."""

    def reported() -> bool:
        described = worker.describe_worker()
        return expected == {name: getattr(described, name) for name in expected}

    wait_until(reported, f"a worker with {expected}")


def test_a_seed_gives_the_same_tokens_alone_and_in_a_batch(worker: Client) -> None:
    """Sampled tokens depend on the seed, and not on other sequences in the batch."""
    options = {"temperature": 1.2, "top_k": 50, "top_p": 0.95, "ignore_eos": True}

    def sampled(seed: int) -> list[int]:
        return list(worker.generate(PROMPT, 30, seed=seed, **options))

    alone = [sampled(seed) for seed in range(4)]
    assert 4 == len(set(map(tuple, alone)))
    with ThreadPoolExecutor(4) as pool:
        assert alone == list(pool.map(sampled, range(4)))


def test_replies_have_log_probabilities(worker: Client) -> None:
    """Each token has log probabilities, and the first reply has the prompt's log probabilities."""
    replies = list(worker.replies(PROMPT, 6, logprobs=2, prompt_logprobs=1, ignore_eos=True))
    tokens = [i for r in replies for i in r.token_ids]
    assert list(worker.generate(PROMPT, 6, ignore_eos=True)) == tokens
    for token, logprobs in zip(tokens, (r.logprobs for r in replies), strict=True):
        assert [(1, 2)] * 2 == [np.shape(logprobs.top_ids), np.shape(logprobs.top)]
        assert token == logprobs.top_ids[0][0]
        assert logprobs.top[0][:1] == logprobs.chosen
    assert [True] + [False] * 5 == [r.prompt_logprobs is not None for r in replies]
    assert (4, 4) == (len(replies[0].prompt_logprobs.chosen), len(replies[0].prompt_logprobs.top))
    scored = list(worker.replies(PROMPT, 0, prompt_logprobs=1))
    assert [([], "length")] == [(list(r.token_ids), r.finish_reason) for r in scored]


def test_a_description_has_ids_weights_and_rows(
    worker: Client, checkpoint: Path, table: tuple[str, str]
) -> None:
    """A description has ids, the size of the weights without FFN-M, and counts of rows."""
    before = worker.describe_worker().rows
    list(worker.generate([7, 8, 9], 5, ignore_eos=True))
    described = worker.describe_worker()
    opened = open_checkpoint(checkpoint)
    identity = (described.model, described.table, described.model_id, described.tokenizer_id)
    assert ("tiny-memory", table[1], opened.model_id(), opened.tokenizer_id) == identity
    config = opened.config
    ffn = 3 * config.hidden_size * config.intermediate_size + config.hidden_size
    saved = described.dense_weight_bytes - described.weight_bytes
    assert 2 * config.num_hidden_layers * ffn == saved
    counts = [rows.from_cache + rows.from_remote for rows in (before, described.rows)]
    assert 3 + 4 == counts[1] - counts[0]  # the prompt, and each sampled token but the last


def test_a_worker_loads_no_embedding_if_the_table_has_x0(tmp_path: Path) -> None:
    """With x0 in the table, a worker loads no embedding, and its completions are the same."""
    path, url = (
        tiny_model(tmp_path / "untied", tie_word_embeddings=False),
        f"file://{tmp_path}/tables",
    )
    config, found = open_checkpoint(path).config, []
    for embedding in ("no", "yes"):
        ref = build_table(path, url, shards=4, embedding=embedding)
        with (
            local_cluster(path, url, worker_options=("--table", ref)) as cluster,
            Client(cluster.workers) as client,
        ):
            found.append(
                (list(client.generate(PROMPT, 20, ignore_eos=True)), client.describe_worker())
            )
    (tokens, without), (same, with_x0) = found
    assert (
        tokens == same == list(greedy(open_checkpoint(path).model(), PROMPT, 20, ignore_eos=True))
    )
    assert 2 * config.vocab_size * config.hidden_size == without.weight_bytes - with_x0.weight_bytes
    assert without.table != with_x0.table


def test_cancelling_stops_the_work(worker: Client) -> None:
    """A cancelled request leaves no sequence in the batch."""
    tokens = worker.generate(PROMPT, 240, ignore_eos=True)
    next(tokens)
    tokens.close()
    settle(worker, running=0, waiting=0)


def test_a_full_queue_refuses_requests_and_serves_queued_ones(worker: Client) -> None:
    """Requests beyond the queue's capacity get RESOURCE_EXHAUSTED, and all others complete."""

    def attempt(_: int) -> int | str:
        try:
            return len(list(worker.generate(PROMPT, 200, ignore_eos=True)))
        except errors.OverloadedError as error:
            return str(error)

    with ThreadPoolExecutor(30) as pool:
        results = list(pool.map(attempt, range(30)))
    served = [r for r in results if r == 200]
    assert len(served) >= 4
    assert all("try again later" in r for r in results if r != 200)
    assert len(served) < 30
    settle(worker, running=0, waiting=0)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"prompt_token_ids": []}, "empty"),
        ({"prompt_token_ids": [99_999]}, "allowed are 0 to"),
        ({"prompt_token_ids": [1] * 256}, "maximum context length is 256"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 2**32 - 1}, "reduce the length"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 2}, "top_p"),
        ({"stop_token_ids": [99_999]}, "stop_token_ids"),
        ({"logit_bias": {99_999: 1}}, "logit_bias: token id 99999"),
        ({"logit_bias": {1: float("nan")}}, "logit_bias"),
        ({"logprobs": 21}, "logprobs: Input should be less than or equal to 20"),
        ({"min_tokens": 4}, "min_tokens"),
    ],
)
def test_an_invalid_request_has_a_status(cluster: Cluster, request_: dict, message: str) -> None:
    """An invalid request is refused with a status before it enters the queue."""
    fields = {"prompt_token_ids": [1], "max_tokens": 3, **request_}
    request = generation_pb2.GenerateRequest(**fields)
    with grpc.insecure_channel(cluster.workers) as channel, pytest.raises(grpc.RpcError) as caught:
        list(GenerationStub(channel).Generate(request, timeout=30))
    too_long = message in ("maximum context length is 256", "reduce the length")
    assert ("OUT_OF_RANGE" if too_long else "INVALID_ARGUMENT") == caught.value.code().name
    assert message in caught.value.details()


def test_the_metrics_count_tokens_and_rows(cluster: Cluster, worker: Client) -> None:
    """The metrics have the counts of tokens and rows."""
    list(worker.generate(PROMPT, 5, ignore_eos=True))
    process = next(p for p in cluster.processes if p.ready["service"] == "worker")
    lines = [line for line in metrics(process).splitlines() if line.startswith("tolhouse_worker")]
    values = dict(line.rsplit(" ", 1) for line in lines)
    rows = worker.describe_worker().rows
    assert float(values["tolhouse_worker_tokens_total"]) >= 5
    assert rows.from_cache == float(values['tolhouse_worker_rows_total{source="cache"}'])
    assert rows.from_remote == float(values['tolhouse_worker_rows_total{source="remote"}'])
    assert 0 == float(values["tolhouse_worker_kv_cache_usage_ratio"])
    assert (
        values["tolhouse_worker_step_row_wait_seconds_count"]
        == values["tolhouse_worker_steps_total"]
    )
    waits = "step_row_wait_seconds_sum", "row_wait_seconds_total"
    each, total = (float(values[f"tolhouse_worker_{name}"]) for name in waits)
    assert total == pytest.approx(each)


def test_a_base_model_needs_no_table(base: Path) -> None:
    """A worker serves a dense model without a row source."""
    with process("worker", str(base), *LOCAL) as running, Client(running.address) as client:
        assert list(greedy(open_checkpoint(base).model(), PROMPT, 20)) == list(
            client.generate(PROMPT, 20)
        )
        assert "" == client.describe_worker().table


@pytest.mark.parametrize("scheme", ["file", "redis"])
def test_rows_are_read_without_a_lookup_service(
    scheme: str, checkpoint: Path, table: tuple[str, str], redis_url: str
) -> None:
    """A worker can read rows directly from a store, and counts file and remote rows separately."""
    if scheme == "redis":
        build_table(checkpoint, redis_url, shards=4)
    url = table[0] if scheme == "file" else redis_url
    with (
        process("worker", str(checkpoint), "--rows", url, *LOCAL) as running,
        Client(running.address) as client,
    ):
        expected = list(greedy(open_checkpoint(checkpoint).model(), PROMPT, 20, ignore_eos=True))
        assert expected == list(client.generate(PROMPT, 20, ignore_eos=True))
        rows = client.describe_worker().rows
        assert (scheme == "file", scheme == "redis") == (rows.from_file > 0, rows.from_remote > 0)


# failing lookup services


@pytest.fixture
def lookup(table: tuple[str, str]) -> Iterator[Process]:
    with process("lookup", "--store", table[0], *LOCAL) as running:
        yield running


def test_a_lost_lookup_service_fails_only_sequences_that_need_it(
    checkpoint: Path, table: tuple[str, str]
) -> None:
    """Without the lookup service, only sequences that need a missing row fail."""
    address = f"127.0.0.1:{free_port()}"
    with ExitStack() as stack:
        lookup = stack.enter_context(process("lookup", "--store", table[0], "--listen", address))
        options = ("--rows", address, "--fetch-timeout-seconds", "2", *LOCAL)
        worker = stack.enter_context(process("worker", str(checkpoint), *options))
        client = stack.enter_context(Client(worker.address))
        expected = list(client.generate(PROMPT, 20, ignore_eos=True))
        lookup.popen.send_signal(signal.SIGKILL)
        lookup.popen.wait()
        with pytest.raises(
            errors.UnavailableError, match="cannot be read now; try again"
        ) as failed:
            list(client.generate([250, 251, 252], 20))
        assert address not in str(failed.value)  # callers cannot use the address
        assert address in worker.log.read_text(encoding="utf-8")
        assert expected == list(client.generate(PROMPT, 20, ignore_eos=True))
        stack.enter_context(process("lookup", "--store", table[0], "--listen", address))
        wait_until(lambda: 20 == len(list(client.generate([250, 251, 252], 20, ignore_eos=True))))
        settle(client, running=0, waiting=0)


def test_a_hung_lookup_service_ends_sequences_at_the_deadline(
    checkpoint: Path, lookup: Process
) -> None:
    """A hung lookup service ends a sequence with an error after the deadline."""
    options = ("--rows", lookup.address, "--fetch-timeout-seconds", "1", *LOCAL)
    with process("worker", str(checkpoint), *options) as worker, Client(worker.address) as client:
        send_signal(lookup.pid, signal.SIGSTOP)
        with pytest.raises(errors.DeadlineExceededError, match="cannot be read now"):
            list(client.generate(PROMPT, 20, timeout=60))
        lookup.popen.send_signal(signal.SIGCONT)
        assert 20 == len(list(client.generate(PROMPT, 20, ignore_eos=True)))


@pytest.mark.parametrize("trouble", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("embedding", ["yes", "no"])
def test_with_a_fallback_a_lost_lookup_service_changes_no_token(
    embedding: str, trouble: signal.Signals, tmp_path: Path
) -> None:
    """With --fallback, the worker recomputes rows while the lookup service is down."""
    path, url, address = (
        tiny_model(tmp_path / "untied", tie_word_embeddings=False),
        f"file://{tmp_path}/tables",
        f"127.0.0.1:{free_port()}",
    )
    build_table(path, url, shards=4, embedding=embedding)
    expected = list(greedy(open_checkpoint(path).model(), PROMPT, 200, ignore_eos=True))
    options = ("--fallback", "recompute", "--fetch-timeout-seconds", "1", *UNCACHED)
    with ExitStack() as stack:
        lookup = stack.enter_context(
            process("lookup", "--store", url, "--listen", address, "--hot-megabytes", "0")
        )
        worker = stack.enter_context(
            process("worker", str(path), "--rows", address, *options, *LOCAL)
        )
        client = stack.enter_context(Client(worker.address))
        tokens = client.generate(PROMPT, 200, ignore_eos=True)
        begun = [next(tokens) for _ in range(5)]
        send_signal(lookup.pid, trouble)
        assert expected == begun + list(tokens)
        assert expected == list(client.generate(PROMPT, 200, ignore_eos=True))
        rows = client.describe_worker().rows
        assert rows.from_remote > 0
        assert rows.recomputed > 200
        counted = f'tolhouse_worker_rows_total{{source="recomputed"}} {float(rows.recomputed)}'
        assert counted in metrics(worker)
        if trouble == signal.SIGKILL:
            lookup.popen.wait()
            stack.enter_context(process("lookup", "--store", url, "--listen", address))
        else:
            lookup.popen.send_signal(signal.SIGCONT)
        answers = []

        def is_fetched_again() -> bool:
            before = client.describe_worker().rows
            answers.append(list(client.generate(PROMPT, 20, ignore_eos=True)))
            after = client.describe_worker().rows
            fetched = after.from_remote - before.from_remote
            return (0, 24) == (after.recomputed - before.recomputed, fetched)

        wait_until(is_fetched_again)
        assert all(expected[:20] == answer for answer in answers)


def test_a_corrupt_row_fails_only_sequences_that_need_it(checkpoint: Path, redis_url: str) -> None:
    """A sequence with a corrupt row ends with DATA_LOSS, and the others in its batch complete."""
    ref = build_table(checkpoint, redis_url, shards=4, name="corrupt")
    with Redis.from_url(redis_url) as redis:
        record = redis.hget(f"tolhouse:{{{ref}:shards-4:2}}", 250)
        redis.hset(f"tolhouse:{{{ref}:shards-4:2}}", 250, bytes([record[0] ^ 1]) + record[1:])
    with (
        local_cluster(checkpoint, redis_url, worker_options=("--table", ref)) as cluster,
        Client(cluster.workers) as client,
    ):

        def attempt(prompt: list[int]) -> int | str:
            try:
                return len(list(client.generate(prompt, 1)))
            except errors.CorruptError as error:
                return str(error)

        with ThreadPoolExecutor(9) as pool:
            results = list(pool.map(attempt, [[250], *([n, n + 1] for n in range(20, 28))]))
        assert results[0].endswith(f"the row of token 250 in table {ref} is missing or damaged")
        assert [1] * 8 == results[1:]
        assert "tolhouse_worker_rows_missing_total 0.0" not in metrics(cluster.processes[1])


def test_a_missing_table_is_a_server_error(checkpoint: Path) -> None:
    """Without its table, sequences end with UnavailableError until the table is loaded again."""
    address = f"127.0.0.1:{free_port()}"
    with redis_server() as url, ExitStack() as stack:
        ref = build_table(checkpoint, url, shards=4)
        first = stack.enter_context(process("lookup", "--store", url, "--listen", address))
        worker = stack.enter_context(
            process("worker", str(checkpoint), "--rows", address, *UNCACHED, *LOCAL)
        )
        client = stack.enter_context(Client(worker.address))
        expected = list(client.generate(PROMPT, 10))
        end(first.popen)
        with Redis.from_url(url) as redis:
            redis.flushall()
        stack.enter_context(process("lookup", "--store", url, "--listen", address))

        def is_refused() -> bool:  # the worker may first have to reconnect
            with pytest.raises(errors.UnavailableError):
                list(client.generate(PROMPT, 10))
            return f"table {ref} is not in" in worker.log.read_text(encoding="utf-8")

        wait_until(is_refused)
        build_table(checkpoint, url, shards=4)
        assert expected == list(client.generate(PROMPT, 10))


def refused(*arguments: str | Path) -> str:
    return tolhouse("worker", *arguments, code=1).stderr


def test_a_failed_start_is_a_one_line_error(
    checkpoint: Path, flex_checkpoint: Path, lookup: Process, cluster: Cluster, tmp_path: Path
) -> None:
    """A wrong tokenizer, a missing table or service, and a bad value are each an error."""
    to = ("--rows", lookup.address)
    assert "was built from model" in refused(str(flex_checkpoint), *to, "--table", "tiny-memory")
    renamed = tmp_path / "tiny-memory"
    renamed.mkdir()
    for file in checkpoint.iterdir():
        (renamed / file.name).write_bytes(file.read_bytes())
    text = (renamed / "tokenizer.json").read_text(encoding="utf-8")
    (renamed / "tokenizer.json").write_text(text + "\n", encoding="utf-8")
    assert "was built from tokenizer" in refused(str(renamed), *to)
    assert "not published" in refused(
        str(checkpoint), *to, "--table", "nothing", "--lookup-wait-seconds", "0.2"
    )
    nobody = ("--rows", f"127.0.0.1:{free_port()}", "--lookup-wait-seconds", "0.5")
    assert "cannot be reached" in refused(str(checkpoint), *nobody)
    assert "in use" in refused(str(checkpoint), *to, "--listen", cluster.workers)
    assert "TOLHOUSE_WORKER_MAX_NUM_SEQS" in refused(str(checkpoint), *to, "--max-num-seqs", "0")
    assert "holds no block" in refused(str(checkpoint), *to, "--kv-cache-megabytes", "0.001")
    assert "cpu or" in refused(str(checkpoint), *to, "--device", "abacus")
    assert "no checkpoint" in refused(str(tmp_path / "nothing"), *to)


def test_a_worker_loads_its_weights_while_it_waits_for_its_table(
    checkpoint: Path, tmp_path: Path
) -> None:
    """A worker that starts before its table is published has its weights by then, and serves."""
    url = f"file://{tmp_path}"
    with start(f"worker --rows {url} --lookup-wait-seconds 60", checkpoint, *LOCAL) as popen:
        assert popen.stderr
        assert popen.stdout
        expected = {"weights loaded", "waiting for the table"}
        for line in popen.stderr:
            expected -= {message for message in expected if message in line}
            if not expected:
                break
        build_table(checkpoint, url)
        with Client(json.loads(popen.stdout.readline())["address"]) as client:
            assert 4 == len(list(client.generate([1, 2, 3], 4, ignore_eos=True)))
        popen.terminate()
        assert 0 == popen.wait(60)


def test_a_worker_waits_for_a_hung_store_at_start(checkpoint: Path) -> None:
    """A worker waits for a Redis that accepts connections but does not answer yet."""
    with redis_node() as node, ThreadPoolExecutor(1) as background:
        ref = build_table(checkpoint, node.url, name="late")
        send_signal(node.popen.pid, signal.SIGSTOP)
        source = StoreRowSource(node.url, lambda: open_store(node.url, 0.1))
        try:
            waiting = background.submit(wait_for_table, source, "late", 60)
            with pytest.raises(errors.DeadlineExceededError):
                wait_for_table(source, "late", 0)
            node.popen.send_signal(signal.SIGCONT)
            assert ref == waiting.result(60).ref
        finally:
            node.popen.send_signal(signal.SIGCONT)
            source.close()


@pytest.mark.parametrize("policy", ["window", "score"])
def test_a_worker_has_a_policy_of_the_kv_cache(
    checkpoint: Path, table: tuple[str, str], policy: str
) -> None:
    """A worker with a policy generates the tokens of an engine with it."""
    options = (
        "--kv-policy",
        policy,
        "--kv-sinks",
        "2",
        "--kv-window",
        "20",
        "--kv-keep-share",
        "0.3",
    )
    prompt = [(n * n + 7 * n) % 250 + 1 for n in range(100)]
    kept = Window(2, 20) if policy == "window" else Score(2, 20, 0.3)
    with closing(open_row_source(table[0])) as source:
        manifest = source.describe(table[1])
        with closing(CachedRows(source, manifest, manifest.table_bytes, CPU)) as rows:
            serve(engine_of(checkpoint, rows, policy=kept), request := Request(prompt, 30))
    model = open_checkpoint(checkpoint).model()
    assert list(greedy(model, prompt, 30, ignore_eos=True)) != request.tokens
    with (
        local_cluster(checkpoint, table[0], worker_options=options) as cluster,
        Client(cluster.workers) as client,
    ):
        assert request.tokens == list(client.generate(prompt, max_tokens=30, ignore_eos=True))


def test_a_worker_adds_summary_tokens(checkpoint: Path, tmp_path: Path) -> None:
    """With summary tokens, a worker generates the text tokens of an engine with that policy, and
    its callers neither see nor send summary tokens. A model without them is refused."""
    path = tiny_model(tmp_path / "summing", vocab_size=400, summary_tokens=2, summary_segment=16)
    url, size = f"file://{tmp_path}/tables", open_checkpoint(path).config.text_vocab_size
    ref, policy = build_table(path, url), Summary(16, (size, size + 1))
    prompt = [(n * n + 7 * n) % 250 + 1 for n in range(100)]
    with closing(open_row_source(url)) as source:
        manifest = source.describe(ref)
        with closing(CachedRows(source, manifest, manifest.table_bytes, CPU)) as rows:
            serve(engine_of(path, rows, policy=policy), request := Request(prompt, 40))
    options = ("--kv-policy", "summary")
    with (
        local_cluster(path, url, worker_options=options) as cluster,
        Client(cluster.workers) as client,
    ):
        limits = {"max_tokens": 40, "ignore_eos": True}
        assert request.tokens == list(client.generate(prompt, **limits))
        info = client.describe_worker()
        # 256 positions are 14 segments with their summary tokens, and 4 tokens more.
        assert (size, 14 * 16 + 4) == (info.vocab_size, info.context_tokens)
        with pytest.raises(errors.InvalidArgumentError, match="outside the vocabulary"):
            list(client.generate([5, size], max_tokens=1))
        with pytest.raises(errors.InvalidArgumentError, match="outside the vocabulary"):
            list(client.generate([5], max_tokens=1, logit_bias={size: 1.0}))
        with pytest.raises(errors.IdOutOfRangeError, match="is 228 tokens"):
            list(client.generate(prompt, max_tokens=129))
    with process("worker", str(path), "--rows", url, *LOCAL) as worker:
        assert "use --kv-policy summary" in worker.log.read_text(encoding="utf-8")
    refused = tolhouse("worker", str(checkpoint), *options, *LOCAL, "--rows", url, code=1)
    assert "--kv-policy summary needs a model with summary tokens" in refused.stderr
