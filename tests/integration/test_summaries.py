"""Summary tokens that were trained, with appended rows, behind a lookup service and a worker."""

from loadtest.related_summary import FACTS, summaries


def test_a_model_recalls_across_segments_with_summary_tokens() -> None:
    """A trained model answers questions about earlier segments through a worker with `--kv-policy
    summary` and with rows that were appended to the table of its parent. Without the summary tokens
    of earlier segments it can only guess."""
    found = summaries(64)
    assert found["summary_recall"] > 0.9
    assert found["summary_recall_without"] < 4 / FACTS
    assert found["appended_rows_served"]
