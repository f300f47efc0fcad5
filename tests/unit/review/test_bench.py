"""The log that the benchmark asks is one that a broker would have written, as long as it was told, with a run to ask for."""

from benchmarks.review import written
from broker.audit.index import Index, Wanted
from broker.audit.verify import verify
from broker.review.clusters import clusters


def test_the_benchmarks_log_is_a_real_one(tmp_path):
    run = written(tmp_path, 3_001)
    assert verify(tmp_path / "audit", None).records == 3_001
    with Index(tmp_path) as index:
        assert index.update() == 3_001
        assert {each.code for each in clusters(index, 0)} == {
            "host_not_declared", "operation_not_declared", "params_invalid", "rate_limited",
        }  # fmt: skip
        assert len([*index.find(Wanted(run=run))]) > 1
