"""The table of awkward inputs."""

from bench.cases import edge


def test_fastsal_is_right_on_every_awkward_input_and_the_table_tells_what_is_not():
    record = edge.record()
    for name in (name for name in record["rows"] if name.startswith("fastsal")):
        row = dict(record["rows"][name])
        assert row.pop("n = 1") == "ValueError"
        assert set(row.values()) == {"right"}
    assert record["rows"]["eager torch"]["gradients of 1e-25"] == "inf"
    assert record["rows"]["Gram by bmm"]["rows 1e-4 apart"] != "right"
    assert edge._one(0.0, float("inf")) == "0"
    assert edge._one(1.0, 2.0) == "0.5×"
