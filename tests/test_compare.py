"""Two sets of results: what pairs and what does not, differences that can be redone by hand, and a readable table."""

import math

import pytest

from axmoe_lite import paths, runs
from axmoe_lite.runs.collect import collect
from axmoe_lite.runs.compare import compare, table

KEY = ("network", "multiplier", "regime", "retrain_epochs", "seed")
ORIGIN = {"dataset": "cifar100", "n_train": 50000, "n_test": 10000, "scale": "paper", "seed": 0, "epochs": 60}
ORIGIN |= {"device": "toy", "commit": "abc", "date": "2026-01-01", "version": "0.1.0", "seconds": 1.5}
BEFORE, AFTER = "study:regime=not retrained", "study:regime=retrained"
# KVA over three seeds: differences 0.1, 0.2, 0.0; KV6 once: -0.05
TOP1 = {("KVA", 0): (0.5, 0.6), ("KVA", 1): (0.5, 0.7), ("KVA", 2): (0.6, 0.6), ("KV6", 0): (0.65, 0.6)}


def row(multiplier, seed, regime, top1, **changed):
    after = 5 * (regime == "retrained")
    key = {"network": "resnet20", "multiplier": multiplier, "regime": regime, "retrain_epochs": after}
    return {**key, "top1": top1, "loss": 1 - top1, **ORIGIN, "seed": seed, **changed}


@pytest.fixture
def study(elsewhere):
    """Before and after retraining, and a float32 row that has only a before."""
    rows = [
        row(m, seed, r, v)
        for (m, seed), both in TOP1.items()
        for r, v in zip(("not retrained", "retrained"), both, strict=True)
    ]
    return runs.record("study", [*rows, row("float32", 0, "not retrained", 0.7)], key=KEY)


def test_before_and_after_retraining(study):
    found = compare(BEFORE, AFTER)
    assert found.by == ["network", "multiplier", "seed"]
    assert found.notes == [
        "not paired by regime: not retrained in a, retrained in b",
        "not paired by retrain_epochs: 0 in a, 5 in b",
    ]
    pairs = found.pairs.round(6)[["multiplier", "seed", "value", "a", "b", "difference"]].values.tolist()
    assert pairs == [
        ["KVA", 0, "top1", 0.5, 0.6, 0.1],
        ["KVA", 1, "top1", 0.5, 0.7, 0.2],
        ["KVA", 2, "top1", 0.6, 0.6, 0.0],
        ["KV6", 0, "top1", 0.65, 0.6, -0.05],
    ]
    assert found.only_in_a["multiplier"].tolist() == ["float32"] and len(found.only_in_b) == 0


def test_spread_over_seeds_and_the_interval_of_the_mean(study):
    found = compare(BEFORE, AFTER)
    many, one = found.groups.to_dict("records")
    assert (many["multiplier"], many["n"]) == ("KVA", 3) and (one["multiplier"], one["n"]) == ("KV6", 1)
    assert many["difference"] == pytest.approx(0.1) and many["sd"] == pytest.approx(0.1)  # of 0.1, 0.2, 0.0
    assert many["a"] == pytest.approx(1.6 / 3) and math.isnan(one["sd"])
    (whole,) = compare(f"{BEFORE},multiplier=KVA", AFTER).summary.to_dict("records")
    half = 4.302653 * 0.1 / 3**0.5  # Student's t with 2 degrees of freedom, as in any printed table
    assert (whole["n"], whole["higher"], whole["lower"], whole["equal"]) == (3, 2, 0, 1)
    assert [whole[part] for part in ("low", "high")] == pytest.approx([0.1 - half, 0.1 + half], abs=1e-6)
    (whole,) = found.summary.to_dict("records")  # 0.1, 0.2, 0.0, -0.05: mean 0.0625, median 0.05
    assert [whole[part] for part in ("n", "mean", "median", "min", "max")] == pytest.approx(
        [4, 0.0625, 0.05, -0.05, 0.2]
    )


def test_what_a_reader_sees(study):
    assert table(compare(BEFORE, AFTER)).splitlines() == [
        "a: study:regime=not retrained",
        "b: study:regime=retrained",
        "4 pairs by network, multiplier, seed",
        "  the same in all: network resnet20",
        "  not paired by regime: not retrained in a, retrained in b",
        "  not paired by retrain_epochs: 0 in a, 5 in b",
        "",
        "top1 in %, differences in percentage points:",
        "  multiplier      a      b   b - a  sd over seeds  seeds",
        "  KVA         53.33  63.33  +10.00          10.00      3",
        "  KV6         65.00  60.00   -5.00              –      1",
        "b - a over 4 pairs: mean +6.25, median +5.00, sd 11.09, from -5.00 to +20.00",
        "  95 % interval of the mean: -11.39 to +23.89; b is higher in 2, lower in 1, equal in 1",
        "",
        "only in a: 1 row (multiplier, seed: float32, 0)",
        "only in b: 0 rows",
    ]


def test_one_pair_has_no_spread_and_says_so(study):
    text = table(compare(f"{BEFORE},multiplier=KV6", AFTER))
    assert "nan" not in text and "1 pair by" in text and "sd –" in text and "interval of the mean: –" in text


def test_other_values_than_top1_are_shown_as_they_are(study):
    text = table(compare(BEFORE, AFTER, values=["loss", "top1"]))
    assert "loss:\n" in text and "top1 in %" in text
    assert "KV6           0.35     0.4  +0.05" in text
    study.write_text(study.read_text().replace("top1", "score"))
    assert set(compare(BEFORE, AFTER).pairs["value"]) == {"score", "loss"}, "all that hold fractions"


def test_rows_that_could_pair_twice_are_refused(study):
    with pytest.raises(ValueError) as refusal:
        compare(BEFORE, AFTER, by=["network", "multiplier"])
    assert "3 rows of study:regime=not retrained share a name with others" in str(refusal.value)
    assert "multiplier=KVA. They differ in seed (0; 1; 2): choose rows, as in study:seed=…" in str(refusal.value)
    with pytest.raises(ValueError, match="They differ in regime, retrain_epochs"):
        compare(AFTER, "study", by=["network", "multiplier", "seed"])
    # KVA stands for several rows, but has no partner: what pairs is clear
    assert len(compare(BEFORE, f"{AFTER},multiplier=KV6", by=["multiplier"]).pairs) == 1


def test_columns_that_must_differ_are_left_out_only_if_nothing_is_lost(study):
    runs.record("study", [{**row("KV6", 0, "retrained", 0.7), "retrain_epochs": 10}], key=KEY)
    with pytest.raises(
        ValueError, match=r"They differ in retrain_epochs \(5; 10\): choose rows, as in study:retrain_epochs"
    ):
        compare(BEFORE, AFTER)
    assert compare(BEFORE, f"{AFTER},retrain_epochs=10").pairs["b"].tolist() == [0.7]


def test_two_circuits_of_one_study(study):
    found = compare("study:multiplier=KVA,regime=retrained", "study:multiplier=KV6,regime=retrained")
    assert found.by == ["network", "regime", "retrain_epochs", "seed"] and len(found.only_in_a) == 2
    assert found.notes == ["not paired by multiplier: KVA in a, KV6 in b"]


def test_conditions_that_are_not_alike_are_told(study):
    runs.record("other", [{**row("KV6", 0, "retrained", 0.7), "n_test": 360, "commit": "def"}], key=KEY)
    notes = compare(AFTER, "other").notes
    assert notes == ["unlike: n_test is 10000 in a, 360 in b", "unlike: commit is abc in a, def in b"]


def test_files_of_all_kinds_pair_with_each_other(study, elsewhere, monkeypatch):
    run = runs.Run("toy", {"scale": "paper"}, "aaaaaaaa")
    runs.store.begin(run, notebook="")
    with monkeypatch.context() as inside:
        inside.setenv("AXMOE_RUN", str(run.folder))
        rows = [row("KVA", seed, "retrained", 0.5) for seed in range(3)]
        runs.record("study", rows, key=KEY)
        runs.record("apart", [{"kind": 1, "top1": 0.5, **ORIGIN}], key=("kind",))
    runs.store.write_json(run.folder / "outcome.json", {"state": "finished", "ended": "2026-01-01T10:00:00+01:00"})
    parquet, as_csv = collect().files
    for name in (f"{parquet}:study=study", f"{as_csv}:study=study", str(run.folder / "rows" / "paper" / "study.csv")):
        found = compare(name, "study")
        assert found.by == list(KEY) and found.pairs["difference"].round(6).tolist() == [0.1, 0.2, 0.1], name
    found = compare(str(parquet), str(as_csv))
    assert found.by == ["study", "kind", *KEY] and len(found.pairs) == 4 and len(found.only_in_a) == 0
    alone = elsewhere / "alone.csv"
    alone.write_text(study.read_text())
    with pytest.raises(ValueError, match=r"not known what names a row of .*alone\.csv; say which columns pair"):
        compare(str(alone), str(alone))
    assert len(compare(str(alone), "study").pairs) == 9, "the other's key will do"


def test_a_filters_value_may_hold_commas_and_colons(elsewhere):
    rows = [{"case": case, "top1": 0.5, **ORIGIN} for case in ("conv 3x3, 8 to 8", "swap:KVA", "x")]
    runs.record("speeds", rows, key=("case",))
    for case in ("conv 3x3, 8 to 8", "swap:KVA"):
        found = compare(f"speeds:case={case},seed=0.0", "speeds")
        assert found.pairs["case"].tolist() == [case] and len(found.only_in_b) == 2


@pytest.mark.parametrize(
    ("a", "options", "problem"),
    [
        ("stduy", {}, r"is called 'stduy'\. Did you mean 'study'\? There are study\.$"),
        ("study:KVA", {}, r"Choose rows after a colon, as in NAME:column=value"),
        ("study:regmie=retrained", {}, r"no column 'regmie'\. Did you mean 'regime'\?"),
        ("study:regime=retraned", {}, r"No row of study has regime='retraned'\. Did you mean 'retrained'\?"),
        ("study", {"by": ["sead"]}, r"no column 'sead'\. Did you mean 'seed'\?"),
        ("study", {"values": ["lss"]}, r"no column 'lss'\. Did you mean 'loss'\?"),
        ("study", {"values": ["regime"]}, r"regime of study is no number \(not retrained; retrained\)"),
        (
            "study:multiplier=float32",
            {"by": ["multiplier"]},
            r"the first of a has multiplier=float32; of b, multiplier=KVA",
        ),
    ],
)
def test_what_does_not_exist_is_refused_with_what_does(study, a, options, problem):
    with pytest.raises(ValueError, match=problem):
        compare(a, AFTER, **options)


def test_a_pair_without_a_value_is_left_out_and_told(study):
    study.write_text(study.read_text().replace("retrained,5,0.7,", "retrained,5,,"))
    found = compare(BEFORE, AFTER)
    assert found.notes[-1] == "left out: 1 pair without top1 in a or b" and len(found.pairs) == 3


def test_a_wide_table_fits_a_terminal_and_a_long_one_says_what_it_leaves_out(elsewhere):
    words = "a convolution of a kind that nobody would describe in so many words"
    rows = [{"case": f"{n} {words}", "device_used": f"{n} {words}", "speed": n + 0.5, **ORIGIN} for n in range(100)]
    runs.record("speeds", rows, key=("case", "device_used"))
    lines = table(compare("speeds", "speeds"), limit=10).splitlines()
    assert max(map(len, lines)) <= 120 and "… and 90 more lines like these" in lines
    assert sum("…" in line for line in lines) == 11 and "sd over seeds" not in "".join(lines), "no column is a seed"


def test_the_committed_rows_compare():
    found = compare(
        "axmoe_resnet20_cifar100:regime=not retrained",
        "axmoe_resnet20_cifar100:regime=retrained,retrain_images=2500",
    )
    assert len(found.pairs) >= 5 and "float32" in set(found.only_in_a["multiplier"])
    assert paths.results_dir().is_dir() and max(map(len, table(found).splitlines())) <= 120
